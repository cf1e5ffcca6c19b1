"""What kind of search a model's task line names: one of a few, for a histogram.

The prompt asks for lines such as "Given a claim, find a passage that supports or refutes it". No
two of them need be alike, so the first word that names a form of query decides. A line is not
trusted to be in that form, or in English: where nothing is recognised, the kind says so.
"""

from __future__ import annotations

import re

# by the beginnings of words; the kinds are those of `grid.SEARCHES`, and a few more
_BEGINNINGS = {
    "question": "question|ask|answer|inquir|enquir|faq|how to",
    "keywords": "keyword|key word|search term|tags",
    "claim": "claim|statement|assert|hypothes|verif|fact[- ]check|refut",
    "title": "title|headline|heading|caption",
    "long request": "long|request|situation|scenario",
    "similar document": "similar|duplicat|related (?:document|passage|article|text|page|post)"
    "|another (?:document|passage|article|text|page|post)",
    "description": "descri|whose name",
    "argument": "argument|counter-?argument|opinion|debate|controvers",
    "error or symptom": "error|symptom|problem|troubleshoot|malfunction|diagnos",
    "summary": "summar|synops|gist|abstract",
    "comparison": "compar|contrast|versus|difference",
    "conversation": "conversation|dialog|chat",
}
_FORM = re.compile(
    "|".join(rf"\b(?P<_{n}>{words})" for n, words in enumerate(_BEGINNINGS.values())), re.IGNORECASE
)
_SOUGHT = re.compile(
    r"\b(?:find|search|seek|look|locat|retriev|get|learn|identif|explor|understand|discover|determin"
    r"|information|query)",
    re.IGNORECASE,
)
NO_FORM, OTHER, NONE = "no form named", "not recognised", "no task given"
KINDS = (*_BEGINNINGS, NO_FORM, OTHER, NONE)


def task_kind(task: str) -> str:
    """One of `KINDS` for a task line, which may be any text."""
    if not task.strip():
        return NONE
    if found := _FORM.search(task):
        assert found.lastgroup is not None
        return KINDS[int(found.lastgroup[1:])]
    return NO_FORM if _SOUGHT.search(task) else OTHER
