"""Task lines of models, sorted by hand and by the program."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from drama.augment.grid import SEARCHES
from drama.augment.prompts import SHIPPED
from drama.augment.tasks import KINDS, task_kind

BY_HAND = {
    "Given a question, retrieve the passage that answers it.": "question",
    "A person asks where to buy honey": "question",
    "How to clean a pan, for someone who has never done so.": "question",
    "Keyword search for local shops.": "keywords",
    "Given KEYWORDS that describe a plant, find its page": "keywords",
    "Verify the statement of a politician.": "claim",
    "fact-checking: a claim about floods": "claim",
    "Given a headline, find the story.": "title",
    "A long request of somebody who has moved.": "long request",
    "Find a document that is similar to this one.": "similar document",
    "Given an article, find a related article": "similar document",
    "Given a description of a bird, find what it is called": "description",
    "Given an argument, find one against it": "argument",
    "Given an error message, find the remedy": "error or symptom",
    "Given a summary, find the paper": "summary",
    "Compare two phones": "comparison",
    "Find information on bees": "no form named",
    "Bees.": "not recognised",
    "Наити ответ": "not recognised",
    " \n": "no task given",
}


@pytest.mark.parametrize(("task", "kind"), BY_HAND.items())
def test_lines_sorted_by_hand(task, kind):
    assert task_kind(task) == kind


def test_the_prompts_own_turns():
    turns = yaml.safe_load((SHIPPED / "queries.yaml").read_text())["turns"]
    tasks = [turn["answer"].split("\n")[0].removeprefix("Task: ") for turn in turns]
    expected = ["claim", "long request", "title", "keywords", "question"]
    assert [task_kind(task) for task in tasks] == expected


def test_what_triplets_draw_has_its_kinds_in_the_same_order():
    assert [task_kind(search) for search in SEARCHES] == list(KINDS[:10])


@given(st.text() | st.from_regex(r"(find|ask|long|claims?|\W)*"))
def test_any_text_is_one_of_the_kinds(text):
    assert task_kind(text) in KINDS
