"""What is asked of the LLM when it writes without a corpus: a function of seed and index alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

TOPICS = (
    "medicine and nursing", "biology", "chemistry", "physics", "astronomy", "mathematics",
    "earth and climate", "agriculture and gardening", "animals", "food and cooking",
    "software development", "computer hardware", "machine learning", "data bases", "networks",
    "information security", "mechanical engineering", "buildings and construction", "energy",
    "transport and aviation", "law and courts", "government services", "politics", "economics",
    "personal finance", "taxes and accounting", "insurance", "companies and markets",
    "jobs and hiring", "schools and universities", "history", "archaeology", "geography and travel",
    "languages and linguistics", "literature", "film and television", "music", "visual arts",
    "philosophy", "religion", "psychology", "family and parenting", "sports and fitness",
    "games and hobbies", "cars and repairs", "household and appliances", "shopping and products",
    "news and journalism", "patents and standards", "museums and archives",
)  # fmt: skip
SEARCHES = (
    "questions that one passage answers",
    "short keyword queries, as typed into a search box",
    "claims that a document supports or refutes",
    "titles whose document is sought",
    "long requests that tell a situation and what is needed",
    "a document for which a related or duplicate document is sought",
    "descriptions of something whose name the searcher does not know",
    "arguments for which a counter-argument is sought",
    "error messages or symptoms whose remedy is sought",
    "summaries whose source is sought",
)
QUERY_LENGTHS = (
    "two to five words",
    "six to fifteen words",
    "one sentence",
    "two or three sentences",
)
DOCUMENT_LENGTHS = ("about 40 words", "about 80 words", "about 150 words", "about 250 words")
DIFFICULTIES = ("anyone", "someone who knows the basics of the field", "an expert of the field")
CLARITIES = (
    "says clearly what is sought",
    "is understood with some thought",
    "leaves open what exactly is meant",
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a list of tasks is about: a field, and a way of searching."""

    topic: str
    search: str


@dataclass(frozen=True, slots=True)
class Draw:
    """How a triplet shall be: in words for the prompt, but for the code of the language."""

    language: str
    query_length: str
    document_length: str
    difficulty: str
    clarity: str


def draw_subject(seed: int, index: int) -> Subject:
    """The subject of brainstorm number `index`."""
    return Subject(_one(TOPICS, seed, index, "topic"), _one(SEARCHES, seed, index, "search"))


def draw(seed: int, index: int, languages: Sequence[str] = ("en",)) -> Draw:
    """The form of triplet number `index`; a language listed twice is drawn twice as often."""
    return Draw(
        language=_one(languages, seed, index, "language"),
        query_length=_one(QUERY_LENGTHS, seed, index, "query length"),
        document_length=_one(DOCUMENT_LENGTHS, seed, index, "document length"),
        difficulty=_one(DIFFICULTIES, seed, index, "difficulty"),
        clarity=_one(CLARITIES, seed, index, "clarity"),
    )


def _one(choices: Sequence[str], seed: int, index: int, name: str) -> str:
    digest = blake2b(f"{seed} {index} {name}".encode(), digest_size=8).digest()
    return choices[int.from_bytes(digest, "little") % len(choices)]
