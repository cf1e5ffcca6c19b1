"""Haystacks: texts of an exact number of tokens, each with one sentence that a query asks for.

Passkeys of persons are the test of Wang et al. 2024 (arXiv 2401.00368, "personalized passkey
retrieval"); facts in place of keys, and the lengths, follow LongEmbed (Zhu et al. 2024, arXiv
2404.12096). The text around them is the user's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

from drama.data.sources import read_source
from drama.errors import UserError
from drama.prune.text import documents

NeedleKind = Literal["needle", "passkey"]
KINDS = ("needle", "passkey")
READ_CHARACTERS = 2**22  # as much of a text is read, whatever the lengths, so cells stay alike
SENTENCE_SEARCH = 300  # characters before a depth where a sentence may end
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[\u3002\uff01\uff1f])")
_RECORDS = re.compile(r"\.(jsonl?|ndjson|parquet)(\.gz|\.xz|\.zst)?$")

FIRST = """
Ada Amira Anton Bela Bruno Carla Chidi Clara Dario Dina Edgar Elif Emil Farah Felix Greta Hana
Henrik Ines Ivan Jana Jonas Kaito Katya Lara Leo Lin Luca Maja Marek Mina Nadia Nils Noor Olga Oscar
Paula Pedro Ravi Rosa Samir Sofia Tariq Tessa Uma Viktor Wanda Yusuf
"""
LAST = """
Abara Almeida Andersen Bauer Becker Castro Chen Costa Dubois Eriksen Farkas Fischer Garcia Haddad
Hoffman Ibrahim Ito Jansen Kaya Keller Kovacs Kumar Lambert Lindgren Lopez Marino Meyer Mori Murphy
Nagy Novak Okafor Olsen Park Pereira Petrov Quinn Rao Rossi Santos Sato Schmidt Silva Singh Tanaka
Torres Weber Wolff
"""
CITIES = """
Accra Athens Bergen Bogota Cairo Cork Dakar Delhi Florence Geneva Hanoi Havana Istanbul Krakow Kyoto
Lima Lisbon Manila Nairobi Oslo Porto Prague Quito Riga Seoul Tallinn Toronto Tunis Utrecht Vienna
"""
THINGS = """
accordion barometer canoe carpet chandelier clock compass flute globe harp kettle lantern loom
microscope mirror motorcycle orchid parrot piano quilt saddle sewing-machine sundial telescope
trombone tortoise typewriter violin wardrobe windmill
"""
FACTS = (
    ("{name} keeps a {thing} in {city}.", "Where does {name} keep a {thing}?"),
    ("{name} learned to repair a {thing} in {city}.", "What did {name} learn to repair?"),
    ("{name} moved to {city} to build a {thing}.", "Why did {name} move to {city}?"),
    ("The {thing} in the museum of {city} was a gift from {name}.", "What was a gift from {name}?"),
    ("{name} sold a {thing} to a neighbour in {city}.", "What did {name} sell in {city}?"),
)
PASSKEY = (
    "The pass key of {name} is {key}. Remember it: {key} is the pass key of {name}.",
    "What is the pass key of {name}?",
)


@dataclass(frozen=True)
class Needle:
    """A sentence and the query that only a text with this sentence answers."""

    sentence: str
    query: str


def draw_needles(kind: NeedleKind, number: int, random: Random) -> list[Needle]:
    """Needles about as many different persons.

    Raises:
        UserError: more than there are names.
    """
    names = [f"{first} {last}" for first in FIRST.split() for last in LAST.split()]
    if not 2 <= number <= len(names):
        raise UserError(f"{number} documents: 2 to {len(names):,} can be told apart by names")
    needles = []
    for name in random.sample(names, number):
        sentence, query = PASSKEY if kind == "passkey" else random.choice(FACTS)
        words = {
            "name": name,
            "key": f"{random.randrange(10_000, 100_000)}",
            "city": random.choice(CITIES.split()),
            "thing": random.choice(THINGS.split()),
        }
        needles.append(Needle(sentence.format(**words), query.format(**words)))
    return needles


def read_text(paths: Sequence[str | Path]) -> list[str]:
    """The first documents of some files, `READ_CHARACTERS` in all.

    A file is plain text or records (what `drama shard` reads), packed or not; of a record its
    documents are taken.

    Raises:
        UserError: unreadable, or no text.
    """
    texts: list[str] = []
    size = 0
    for path in paths:
        for text in _texts_of(path):
            texts.append(text[: READ_CHARACTERS - size])
            size += len(texts[-1])
            if size >= READ_CHARACTERS:
                return texts
    if not size:
        raise UserError(f"{', '.join(map(str, paths))}: no text; give text files or records")
    return texts


def beginning_at_random(texts: Sequence[str], random: Random) -> str:
    """All documents in one text, begun with any of them; the first follows the last."""
    start = random.randrange(len(texts))
    return "\n\n".join([*texts[start:], *texts[:start]])


def make_haystacks(
    filler: str,
    sentences: Sequence[str],
    length: int,
    depth: float,
    count: Callable[[str], int],
) -> list[str]:
    """One text of `length` tokens for each sentence, which stands at `depth`, 0 to 1, of it.

    The sentence is put where a sentence of the filler ends, at or before its depth. Where no cut
    of the filler gives `length` exactly (a character of several tokens), the text is shorter by
    what that takes.

    count: tokens of a text as the model sees them.

    Raises:
        UserError: the filler is too short, or the length is for a sentence alone.
    """
    texts, guess = [], 4 * length
    for sentence in sentences:

        def text_of(size: int, sentence: str = sentence) -> str:
            at = size if depth >= 1 else _sentence_end(filler, round(size * depth))
            parts = (filler[:at], sentence, filler[at:size])
            return "\n".join(part for part in parts if part)

        guess = _fit(lambda size: count(text_of(size)), length, guess, len(filler))
        texts.append(text_of(guess))
    return texts


def _fit(count: Callable[[int], int], length: int, guess: int, longest: int) -> int:
    """The size, 0 to `longest`, whose count is `length`, or the largest known below it.

    A count grows with the size, if not at each step: it is bracketed around the guess and halved.
    """
    reach, guess = 64, min(guess, longest)
    low, high = max(0, guess - reach), min(longest, guess + reach)
    while low > 0 and count(low) > length:
        low, reach = max(0, low - reach), 2 * reach
    while high < longest and count(high) < length:
        high, reach = min(longest, high + reach), 2 * reach
    if (found := count(high)) <= length:
        if found < length:
            raise UserError(f"the text is too short for {length:,} tokens; give more --text")
        return high
    if (found := count(low)) >= length:
        if found > length:
            raise UserError(f"a length of {length} tokens holds no needle; take a longer one")
        return low
    while high - low > 1:
        middle = (low + high) // 2
        found = count(middle)
        if found == length:
            return middle
        low, high = (middle, high) if found < length else (low, middle)
    return low


def _sentence_end(text: str, place: int) -> int:
    """Where the last sentence before `place` ends; else a word; else `place` itself."""
    start = max(0, place - SENTENCE_SEARCH)
    ends = [match.end() for match in _SENTENCE_END.finditer(text, start, place)]
    if ends:
        return ends[-1]
    space = text.rfind(" ", start, place)
    return place if space < 0 else space + 1


def _texts_of(path: str | Path) -> Iterator[str]:
    if Path(path).is_dir() or _RECORDS.search(str(path)):
        for record in read_source(path):
            yield from (document.full_text for document in record.positives)
    else:
        yield from documents(path)
