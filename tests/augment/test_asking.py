"""What a request depends on, and extra fields."""

import asyncio
from pathlib import Path

import pytest

from drama.augment.asking import Asking, parse_extra, together
from drama.augment.prompts import Prompt
from drama.errors import UserError

ASKING = Asking("tiny", "http://x/v1", Path("a.sqlite"), 99, 0.5, 0.9, seed=7)


def test_a_request_has_the_parameters_and_a_seed_of_its_own():
    request = ASKING.request([{"role": "user", "content": "x"}], index=3, max_tokens=5)
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (
        5,
        0.5,
        0.9,
        10,
    )
    assert ASKING.request(request.messages).max_tokens == 99


def test_where_a_model_runs_is_not_what_it_answers():
    prompt = Prompt.load("queries")
    about = ASKING.about(prompt)
    assert about["prompts"] == [prompt.key]
    assert "http://x/v1" not in str(about)


def test_all_are_asked_before_the_first_fault_is_raised():
    ended = []

    async def work(number):
        await asyncio.sleep(0.001 * number)
        if number == 1:
            raise UserError("one")
        ended.append(number)
        return number

    async def run(numbers):
        return await together(work(number) for number in numbers)

    assert asyncio.run(run([2, 0, 3])) == [2, 0, 3]
    ended.clear()
    with pytest.raises(UserError, match="one"):
        asyncio.run(run([0, 1, 2, 3]))
    assert ended == [0, 2, 3]


@pytest.mark.parametrize("text", ["", "[1]", "{", "1", '"a"', "[" * 10**5])
def test_extra_fields_are_a_json_object(text):
    assert parse_extra('{"a": {"b": 1}}') == {"a": {"b": 1}}
    with pytest.raises(UserError, match="is no JSON object; write it like"):
        parse_extra(text)
