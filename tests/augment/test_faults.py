"""All kinds with a proxy before the server that fails in every way: the bytes are those of the
undisturbed run, nothing is lost, and no answer that arrived is paid twice."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from drama.augment import patience, queries, rerank, triplets
from drama.augment.endpoint import Endpoint, Trouble
from drama.augment.faults import QUICK, Fault, Proxy, at_random
from drama.augment.testing import ask_for, held_answers, killed, served, wait_until

KINDS = ("queries", "rerank", "triplets", "relabel")


def out_of(command):
    return Path(command[command.index("--out") + 1])


def answers_in(folder):
    return sum(held_answers(path) for path in folder.rglob("*.sqlite"))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    limits = partial(patience.Limits, timeout_s=3.0, first_pause_s=0.01, max_pause_s=0.1)
    monkeypatch.setattr(patience, "Limits", limits)


@pytest.fixture(scope="module")
def undisturbed(commands_in, said, tmp_path_factory):
    """The bytes of each kind's output, and how many answers they took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    commands = commands_in(folder)
    with served() as server:
        for kind in KINDS:
            said(*commands[kind], "--base-url", server.url)
        assert answers_in(folder) == len(server.calls)
    return {kind: out_of(commands[kind]).read_bytes() for kind in KINDS}, answers_in(folder)


def test_faults_change_no_byte_and_cost_only_what_they_destroy(
    commands, undisturbed, server, said, tmp_path
):
    whole, answers = undisturbed
    with Proxy(server.url) as proxy:
        for seed, kind in enumerate(KINDS):
            # some later than the client waits: once, for each costs the whole timeout
            faults = (Fault.SLOW, Fault.HALF_JSON) if kind == "relabel" else QUICK
            proxy.schedule = at_random(seed, 0.4, faults)
            said(*commands[kind], "--base-url", proxy.url, "--concurrency", 16)
            assert out_of(commands[kind]).read_bytes() == whole[kind]
        wait_until(proxy.balanced)
    assert set(proxy.met) == set(Fault)
    assert answers_in(tmp_path) == answers
    assert list(proxy.whole.values()) == [1] * answers
    assert proxy.destroyed.total() > 20
    assert not proxy.gone
    assert not proxy.unanswered
    # the server's own count: no call but for these
    assert len(server.calls) == proxy.asked.total() == answers + proxy.destroyed.total()


def test_server_and_network_die_and_come_back(commands, undisturbed, said, tmp_path):
    def die():
        for dying, after in ((server, 12), (proxy, 35)):
            wait_until(lambda after=after: proxy.whole.total() >= after)
            dying.stop()
            deaths.append(proxy.whole.total())
            time.sleep(0.5)
            dying.start()

    deaths = []
    with served(delay_s=lambda call: 0.05) as server, Proxy(server.url) as proxy:
        reaper = threading.Thread(target=die)
        reaper.start()
        said(*commands["queries"], "--base-url", proxy.url, "--concurrency", 4)
        reaper.join()
    assert deaths[0] < deaths[1] < 60
    assert out_of(commands["queries"]).read_bytes() == undisturbed[0]["queries"]
    assert answers_in(tmp_path) == 60
    assert set(proxy.whole.values()) == {1}
    assert proxy.asked.total() == 60 + proxy.unanswered.total() + proxy.gone.total()
    # of one death, what was in flight, and tries at a server that is not there
    assert len(server.calls) <= 60 + 2 * 4


@pytest.mark.parametrize(
    ("kind", "module", "name", "size"),
    [
        ("queries", queries, "BATCH", 10),
        ("rerank", rerank, "BATCH", 5),
        ("triplets", triplets, "TASKS", 5),
    ],
)
def test_killed_among_faults_a_job_goes_on_to_the_same_bytes(
    commands, said, tmp_path, llm_world, monkeypatch, kind, module, name, size
):
    command = list(commands[kind])
    if kind == "rerank":
        command[2] = llm_world / "pairs.jsonl"
    out = out_of(command)
    place = command.index("--out")
    rest = command[:place] + command[place + 2 :]
    calls = {"queries": 60, "rerank": 30, "triplets": 30 + 6}[kind]
    cache = tmp_path / "answers.sqlite"
    faults = at_random(1, 0.25, QUICK)
    with served(delay_s=lambda call: 0.03) as server, Proxy(server.url, faults) as proxy:
        rest += ["--base-url", proxy.url, "--cache", cache, "--concurrency", 2]
        start = killed(tmp_path, kind, f"{name} = {size}", out, *rest)
        assert 0 < start < calls
        assert start % size == 0
        wait_until(proxy.balanced)
        held = held_answers(cache)
        assert start <= held < calls
        lost = proxy.whole.total() - held  # they arrived with the kill, or were on their way
        assert 0 <= lost <= 2
        monkeypatch.setattr(module, name, size)
        assert "going on after" in said(*rest, "--out", out)
        wait_until(proxy.balanced)
        asked = len(server.calls)
        again = tmp_path / f"again-{out.name}"
        said(*rest, "--out", again, "--max-tokens-total", 0)
        assert len(server.calls) == proxy.asked.total() == asked
    assert out.read_bytes() == again.read_bytes()
    assert held_answers(cache) == calls
    assert proxy.whole.total() == calls + lost
    assert max(proxy.whole.values()) <= 2
    assert proxy.gone.total() <= 2
    report = json.loads((tmp_path / f"{kind}.report.json").read_text())
    assert report["llm"]["calls"] == calls
    assert report["llm_this_run"]["cached"] == held - start * calls // report["read"]


@pytest.mark.parametrize(
    ("fault", "reason", "paid"),
    [
        (None, "", True),
        (Fault.RATE_LIMIT, "HTTP 429", False),
        (Fault.ERROR, "HTTP 500", False),
        (Fault.CUT_BEFORE, "the connection was cut", False),
        (Fault.CUT_AFTER, "the connection was cut", True),
        (Fault.CUT_WITHIN, "the connection was cut", True),
        (Fault.HALF_JSON, "an answer that is not JSON", True),
        (Fault.NOT_JSON, "an answer that is not JSON", True),
        (Fault.SLOW, "no answer within 0.5 s", True),
    ],
)
def test_each_fault_is_what_it_says_and_is_booked(server, fault, reason, paid):
    async def one():
        endpoint = Endpoint(proxy.url, "tiny", "NO_KEY", 0.5)
        endpoint.open()
        outcome = await endpoint.post(ask_for("Retrieval task: x").body("tiny"), "")
        assert await endpoint.is_alive()
        await endpoint.close()
        return outcome

    with Proxy(server.url, lambda key, nth: fault) as proxy:
        outcome = asyncio.run(one())
        wait_until(proxy.balanced)
    assert (outcome.reason if isinstance(outcome, Trouble) else "") == reason
    assert len(server.calls) == proxy.asked.total() == paid
    assert proxy.destroyed.total() == (paid and fault is not None)
    assert len(proxy.delivered) == proxy.whole.total() == (fault is None)
