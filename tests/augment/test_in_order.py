"""Talks out of order, results in order: bounded, and ended cleanly by whatever ends them."""

import asyncio
import threading
import time

import pytest

from drama.augment.chat import Request
from drama.augment.in_order import InOrder, steps
from drama.augment.llm import LLM, IncompleteError
from drama.augment.patience import Limits
from drama.augment.testing import ChatServer, served
from drama.errors import UserError


def request(text):
    return Request(({"role": "user", "content": str(text)},), 16)


async def echo(row, talk):
    return await talk.ask(request(row))


@pytest.fixture
def late():
    """A server that answers the first of every ten last."""

    async def behave(call):
        await asyncio.sleep(0.05 if int(call.prompt) % 10 == 0 else 0.001)

    with ChatServer(behave) as server:
        yield server


def client(url, tmp_path, **limits):
    return LLM(url, "tiny", tmp_path / "a.sqlite", limits=Limits(**({"concurrency": 8} | limits)))


def no_threads():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("drama")]


def test_results_come_in_the_order_of_the_rows(late, tmp_path):
    with InOrder(client(late.url, tmp_path), range(100), echo) as results:
        done = list(results)
    assert [item.value for item in done] == [f"echo: {n}" for n in range(100)]
    assert done[0].counts == {"calls": 1, "prompt tokens": 7, "completion tokens": 3}
    assert list(late.paid) != [str(n) for n in range(100)]  # they were answered in another
    assert no_threads()


def test_only_so_many_rows_are_read_ahead(late, tmp_path):
    read = []
    rows = (read.append(n) or n for n in range(10**9))  # endless
    ahead = []
    with InOrder(client(late.url, tmp_path), rows, echo, ahead=20) as results:
        for number, _ in enumerate(results):
            time.sleep(0.005 if number < 5 else 0)
            ahead.append(len(read) - number)
            if number == 200:
                break
    assert 15 < max(ahead) <= 22
    assert no_threads()


def test_the_results_before_a_fault_come_first(late, tmp_path):
    def rows():
        yield from range(30)
        raise UserError("rows.jsonl:31: not JSON")

    got = []
    with (
        pytest.raises(UserError, match="rows.jsonl:31"),
        InOrder(client(late.url, tmp_path), rows(), echo) as results,
    ):
        got.extend(done.value for done in results)
    assert got == [f"echo: {n}" for n in range(30)]
    assert no_threads()


def test_a_fault_of_the_work_is_raised_as_it_is(late, tmp_path):
    async def work(row, talk):
        return 1 / (row - 7)

    got = []
    with (
        pytest.raises(ZeroDivisionError),
        InOrder(client(late.url, tmp_path), range(50), work) as results,
    ):
        got.extend(results)
    assert len(got) == 7
    assert no_threads()


def test_a_budget_ends_after_what_was_answered(late, tmp_path):
    got = []
    with (
        pytest.raises(IncompleteError, match="budget of 400"),
        InOrder(client(late.url, tmp_path, max_tokens_total=400), range(100), echo) as results,
    ):
        got.extend(done.value for done in results)
    assert got == [f"echo: {n}" for n in range(len(got))]
    paid = sum(late.paid.values())
    assert 40 <= paid <= 48
    with InOrder(client(late.url, tmp_path), range(100), echo) as results:
        assert len(list(results)) == 100
    assert sum(late.paid.values()) == 100
    assert max(late.paid.values()) == 1


def test_ctrl_c_does_not_wait_for_answers(tmp_path, caplog):
    with served(lambda prompt: prompt, delay_s=lambda call: int(call.prompt) * 20) as slow:
        began = time.monotonic()

        def interrupted():
            with InOrder(client(slow.url, tmp_path), range(5), echo) as results:
                assert next(results).value == "0"
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert time.monotonic() - began < 5
        assert not [record for record in caplog.records if record.name == "asyncio"]
    assert no_threads()


def test_a_cache_that_cannot_be_used_is_said(tmp_path):
    (tmp_path / "a.sqlite").write_bytes(b"no database" * 100)
    llm = client("http://127.0.0.1:9/v1", tmp_path)
    with pytest.raises(UserError, match="the cache is damaged"), InOrder(llm, [1], echo) as results:
        next(results)
    assert no_threads()


def test_steps_end_at_fixed_places(late, tmp_path):
    with InOrder(client(late.url, tmp_path), range(25), echo) as results:
        made = list(steps(results, 10, 30))
    assert [step.end for step in made] == [40, 50, 55]
    assert [len(step.results) for step in made] == [10, 10, 5]
    assert made[0].counts["calls"] == 10
