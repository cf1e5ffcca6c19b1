"""What an LLM wrote, read without trust: a value, or why there is none. No text raises.

`parse_query`, `parse_triplet` and `parse_tasks` are here; orders and yes or no lists, which answer
with numbers, in `rankings`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from drama.augment.cleaning import (
    answer_text,
    is_listed,
    is_unspaced,
    plain,
    unlisted,
    unquoted,
    words,
)
from drama.augment.fields import is_object, json_values, line_values
from drama.augment.languages import contradicts, differs, language_code
from drama.augment.loose_json import loose_strings

MAX_QUERY_CHARS = 600
MAX_DOCUMENT_CHARS = 12_000
MIN_DOCUMENT_CHARS = 20
MIN_QUERY_CHARS = 3  # letters and digits; a character of a script without spaces counts twice
# a run of the document's words up to this long may be a title or a term; longer is copied text
TITLE_WORDS = 12
TITLE_CHARS = 30  # in scripts without spaces
MAX_TASK_CHARS = 300
MIN_TASK_WORDS = 3


class Reason(StrEnum):
    """Why an answer was dropped; jobs count by it."""

    EMPTY = "empty answer"
    REFUSAL = "refusal"
    NO_QUERY = "no query found"
    TOO_SHORT = "query too short"
    TOO_LONG = "query too long"
    DOCUMENT_ECHO = "copies the document"
    EXAMPLE_ECHO = "copies an example of the prompt"
    WRONG_LANGUAGE = "wrong language"
    NO_JSON = "no JSON found"
    MISSING_FIELD = "a field is missing or empty"
    SAME_TEXTS = "two of the texts are the same"
    DOCUMENT_LENGTH = "document too short or too long"
    NO_TASKS = "no tasks found"
    NO_RANKING = "no ranking found"
    NO_LABELS = "no yes or no found"


@dataclass(frozen=True, slots=True)
class Dropped:
    """An answer that is of no use."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Query:
    """A query for a document; `task` and `language` (a code) are empty where none was given."""

    text: str
    task: str = ""
    language: str = ""


@dataclass(frozen=True, slots=True)
class Triplet:
    """A query, a document that serves it, and one that does not."""

    query: str
    positive: str
    negative: str


_QUERY_LABELS = {
    "task": r"(?:retrieval |search )?task|tarea|aufgabe|tâche|任务|任務|задача|タスク",
    "query": r"(?:the |user |search |generated )?query|question|consulta|(?:such)?anfrage|requête"
    r"|查询|查詢|запрос|(?:検索)?クエリ",
    "language": r"(?:query )?lang(?:uage)?|idioma|sprache|langue|语言|語言|язык|言語",
}
_TEXT = r"(?:[ _](?:document|doc|passage|text))?"
_TRIPLET_LABELS = {
    "query": r"(?:user |search )?query|question",
    "positive": r"(?:positive|relevant)" + _TEXT,
    "negative": r"(?:hard[ _-]?)?(?:negative|irrelevant)" + _TEXT,
}
# "I can't sleep" is a query; what a model cannot do is one of these
_CANNOT = (
    r"(?:assist|help (?:you|with)|fulfil|provide|generate|create|comply|answer|write|complete"
    r"|process|do that|respond|access|see (?:the|any) document)"
)
_AS_LANGUAGE_MODEL = r"as an? (?:large |ai )?language model\b"
_AS_AI = r"as an? (?:ai|artificial intelligence)(?: model| assistant| system)?"
_REFUSAL = re.compile(  # at the very beginning: "work as an AI engineer" is a query
    r"^\W*(?:unfortunately\W+|(?:i['’]m |i am )?(?:very |so |really )?sorry\W+(?:but )?"
    r"|i apologi[sz]e\W+(?:but )?)?(?:"
    rf"{_AS_LANGUAGE_MODEL}|{_AS_AI},? i\b"
    r"|(?:i (?:can ?not|can['’]t|could not|am (?:not able|unable) to|won['’]t)"
    rf"|i['’]m (?:not able|unable) to|unable to) {_CANNOT}\b(?! (?:to )?(?:my|our)\b)"
    r"|i (?:do not|don['’]t) (?:have (?:access to (?:the|any|that)|enough (?:information|context))"
    r"|see (?:a|any|the) document)\b"
    r"|i apologi[sz]e for (?:the|any) (?:confusion|inconvenience))"
    # the same in other languages
    r"|^\W*(?:lo siento|je suis désolée?|es tut mir leid|desculpe|mi dispiace|к сожалению|извините"
    r"|抱歉|对不起|對不起|申し訳|죄송)[^\n]{0,30}(?:no pued|ne peux|kann|não pos|non pos|не мог"
    r"|无法|無法|不能|できません|できかね|수 없)",
    re.IGNORECASE,
)
_EXCUSE = re.compile(  # enough where no label says that it is a query
    rf"{_AS_LANGUAGE_MODEL}|{_AS_AI},"
    r"|^\W*(?:i['’]m |i am )?(?:very |so )?sorry\b(?:,? but|, i)\b"
    r"|^\W*(?:i apologi[sz]e|lo siento|je suis désolée?|es tut mir leid|desculpe|mi dispiace)\b"
    r"|^\W*(?:к сожалению, я|извините|抱歉|对不起|對不起|申し訳|죄송)",
    re.IGNORECASE,
)
# what stands in the prompt for the query, given back
_TEMPLATE = re.compile(
    r"^\W*(?:(?:the |your |a )?(?:search )?query(?:(?: goes)? here|,? in the language of .*)?"
    r"|question|text|string|none|n/?a|null|\.*)\W*$",
    re.IGNORECASE,
)


def parse_query(answer: str, document: str, examples: Collection[str] = ()) -> Query | Dropped:
    """The query of an answer to "queries": lines or JSON, with whatever stands around them.

    document: the text that was asked about. examples: the queries of the few-shot turns
    (`example_queries`).
    """
    found = _read_query(answer)
    if isinstance(found, Dropped):
        return found
    return _fault(found.text, document, examples) or found


def example_queries(answers: Sequence[str]) -> tuple[str, ...]:
    """The queries in the few-shot answers of a prompt (`Prompt.answers`)."""
    found = (_read_query(answer) for answer in answers)
    return tuple(query.text for query in found if isinstance(query, Query))


def parse_triplet(
    answer: str, language: str = "", examples: Collection[str] = ()
) -> Triplet | Dropped:
    """The triplet of an answer to "triplets": JSON, even if it is broken or cut off, or lines.

    language: the code of the one that was asked for. examples: the queries of the few-shot turns.
    """
    text = answer_text(answer)
    if not text:
        return Dropped(Reason.EMPTY)
    values = json_values(text, _TRIPLET_LABELS)
    if not values and not is_object(text):
        lines = line_values(text, _TRIPLET_LABELS)
        values = {name: next(filter(None, found), "") for name, found in lines.items()}
    if not any(values.values()):
        return Dropped(Reason.REFUSAL if _is_excuse(text) else Reason.NO_JSON)
    query = plain(values.get("query", ""))
    positive, negative = (_document(values.get(name, "")) for name in ("positive", "negative"))
    if not (query and positive and negative) or _TEMPLATE.match(query):
        return Dropped(Reason.MISSING_FIELD)
    if len({" ".join(words(part)) for part in (query, positive, negative)}) < 3:
        return Dropped(Reason.SAME_TEXTS)
    for part in (positive, negative):
        if _weight(part) < MIN_DOCUMENT_CHARS or len(part) > MAX_DOCUMENT_CHARS:
            return Dropped(Reason.DOCUMENT_LENGTH)
    if any(contradicts(part, language) for part in (query, positive, negative)):
        return Dropped(Reason.WRONG_LANGUAGE)
    return _fault(query, positive, examples) or Triplet(query, positive, negative)


def parse_tasks(answer: str) -> tuple[str, ...] | Dropped:
    """The tasks of an answer to "tasks", in order and each once: a list of lines, or JSON."""
    text = answer_text(answer)
    if not text:
        return Dropped(Reason.EMPTY)
    lines = [line for line in text.split("\n") if line.strip()]
    listed = [line for line in lines if is_listed(line)]
    found = loose_strings(text) if text.startswith(("[", "{")) else listed or lines
    tasks: dict[str, str] = {}
    for line in found:
        task = unlisted(line)
        task = re.sub(r"^(?:retrieval )?task(?: \d+)?\W{0,3}:\W*", "", task, flags=re.IGNORECASE)
        unit = words(task)
        long_enough = len(unit) >= MIN_TASK_WORDS and len(task) <= MAX_TASK_CHARS
        if long_enough and not task.endswith((":", "：")) and not _REFUSAL.search(task):
            tasks.setdefault(" ".join(unit), task)
    if tasks:
        return tuple(tasks.values())
    return Dropped(Reason.REFUSAL if _is_excuse(text) else Reason.NO_TASKS)


def _read_query(answer: str) -> Query | Dropped:
    text = answer_text(answer)
    if not text:
        return Dropped(Reason.EMPTY)
    values = json_values(text, _QUERY_LABELS)
    found = {name: [value] for name, value in values.items()}
    if "query" not in values and not is_object(text):
        found = line_values(text, _QUERY_LABELS)
    query = _first(found.get("query", [])) or _lone_query(text)
    if not query:
        return Dropped(Reason.REFUSAL if _is_excuse(text) else Reason.NO_QUERY)
    task, language = _first(found.get("task", [])), _first(found.get("language", []))
    return Query(query, task, language_code(language))


def _is_excuse(text: str) -> bool:
    """Whether an answer without labels begins as refusals do."""
    return bool(_REFUSAL.search(text) or _EXCUSE.search(text[:400]))


def _first(values: Sequence[str]) -> str:
    cleaned = (unlisted(value) for value in values)
    return next((value for value in cleaned if not _TEMPLATE.match(value)), "")


def _lone_query(text: str) -> str:
    """A question or a quotation that is the only one of an answer without labels."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    lines = [line for line in lines if not line.endswith((":", "："))]
    if len(lines) != 1 or not re.search(r"[?？؟]\W*$|^[\"“„«「].*[\"”“»」]$", lines[0]):
        return ""
    if is_object(text) or _is_excuse(text):
        return ""
    query = unlisted(lines[0])
    return "" if _TEMPLATE.match(query) else query


def _fault(query: str, document: str, examples: Collection[str]) -> Dropped | None:
    unit = words(query)
    if _REFUSAL.search(query):
        return Dropped(Reason.REFUSAL)
    if _weight(query) < MIN_QUERY_CHARS:
        return Dropped(Reason.TOO_SHORT)
    if len(query) > MAX_QUERY_CHARS:
        return Dropped(Reason.TOO_LONG)
    if any(unit == words(example) for example in examples):
        return Dropped(Reason.EXAMPLE_ECHO)
    if _copies(unit, document):
        return Dropped(Reason.DOCUMENT_ECHO)
    if differs(query, document):
        return Dropped(Reason.WRONG_LANGUAGE)
    return None


def _copies(query: Sequence[str], document: str) -> bool:
    """Whether at least four fifths of a query are one run of the document, and no mere title."""
    unspaced = 2 * sum(map(is_unspaced, query)) > len(query)
    length = max((TITLE_CHARS if unspaced else TITLE_WORDS) + 1, -(-4 * len(query) // 5))
    if len(query) < length:
        return False
    around = f" {' '.join(words(document))} "
    starts = range(len(query) - length + 1)
    return any(f" {' '.join(query[start : start + length])} " in around for start in starts)


def _weight(text: str) -> int:
    return sum(2 if is_unspaced(word) else len(word) for word in words(text))


def _document(text: str) -> str:
    """A written document: its lines stay, what a model puts around them does not."""
    lines = (" ".join(line.split()) for line in text.strip().split("\n"))
    kept = "\n".join(line for line in lines if line)
    return unquoted(kept)
