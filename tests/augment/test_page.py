"""The page of jobs: its numbers are those of the records, and hostile texts stay texts."""

import json
import random
from collections import Counter
from html.parser import HTMLParser

import pytest

from drama.augment.job import Dropped, Job, Kept, Step
from drama.augment.page import SHOWN_NAMES, write_page, write_run
from drama.augment.reports import read_report
from drama.data.records import Document, Record
from drama.data.sources import read_source
from drama.errors import UserError

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></title></svg><img src=x onerror=alert(1)>",
    "\"><b onclick='x'>",
    "&lt;already&gt; &amp;",
    "שלום \u202e evil \u2067 order",
    "nul \x00 escape \x1b[31m bell \x07 c1 \x9b \ufffe",
    "{style} {0} %s \\ $x$",
    "-->]]><!--",
)
TOTAL = 300


class Page(HTMLParser):
    """Tiles, bars by the card's caption, and all words; fails on tags that do not nest."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.tiles, self.cards, self._cells = {}, {}, []
        self.caption, self.rows = "", []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag != "meta":
            self.open.append(tag)
        if tag in ("tr", "div"):
            self._cells = []
        if tag == "figure":
            self.caption = ""

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "div" and len(self._cells) == 2:
            self.tiles[self._cells[1]] = self._cells[0]
        if tag == "tr" and not self.caption:
            self.rows.append(list(self._cells))
        elif tag == "tr":
            name, count = self._cells[:2] if len(self._cells) > 1 else ("", self._cells[0])
            self.cards.setdefault(self.caption, {})[name] = int(count.replace(",", ""))

    def handle_data(self, data):
        if not data.strip():
            return
        self.words.append(data)
        if self.open[-1] == "figcaption":
            self.caption = data
        if "svg" in self.open and self.open[-1] == "text":
            self.cards.setdefault(self.caption, {})[data] = "drawn"
        self._cells.append(data)


def result(number):
    draw = random.Random(number)
    if draw.random() < 0.2:
        return Dropped(draw.choice(["too short", "no answer", HOSTILE[0]]))
    words = ["bees", "bread", "tides", "honey", *HOSTILE]
    query = f"{number} {' '.join(draw.choices(words, k=draw.randint(1, 12)))}"
    documents = tuple(
        Document(" ".join(draw.choices(words, k=20)), draw.choice(["", HOSTILE[1]]), f"{i}")
        for i in range(5)
    )
    cut = draw.randint(1, 3)
    record = Record(
        query,
        documents[:cut],
        documents[cut : draw.randint(cut, 5)],
        source=draw.choice(HOSTILE[:3]),
        lang=draw.choice(["", "de", "he", HOSTILE[2]]),
    )
    labels = {"task": draw.choice(["claim", "title"])}
    return Kept(record, draw.choice([0, 1, 7]), {"copy of another": number % 3}, labels)


def work(out):
    with Job(out, "test", {"seed": 0, "path": HOSTILE[1]}) as job:
        steps = (
            Step(n + 10, [result(i) for i in range(n, n + 10)], {"calls": 10, "prompt tokens": 70})
            for n in range(job.start, TOTAL, 10)
        )
        return job.run(steps, TOTAL)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "out.jsonl.gz"
    work(path)
    return path


def histogram(values):
    """Counts in the order of the power of two that holds a value, spelled as on the page."""
    ends = Counter()
    for value in values:
        end = 1
        while end < value:
            end *= 2
        ends[end] += 1
    return {f"{count:,}" for count in ends.values()}


def test_its_numbers_are_those_of_the_records(out):
    page = Page(out.with_name("out.report.html"))
    records = list(read_source(out))
    results = [result(number) for number in range(TOTAL)]
    count = len(records)
    positives, negatives = (
        [len(getattr(record, name)) for record in records] for name in ("positives", "negatives")
    )
    ranks = Counter(item.own_rank for item in results if isinstance(item, Kept))
    assert page.tiles == {
        "read": "300",
        "kept": str(count),
        "dropped": str(TOTAL - count),
        "kept, of those read": f"{100 * count / TOTAL:.1f}%",
        "positives a record, mean": f"{sum(positives) / count:.4g}",
        "hard negatives a record, mean": f"{sum(negatives) / count:.4g}",
        "own document first": f"{100 * ranks[1] / count:.1f}%",
        "own document found": f"{100 * (ranks[1] + ranks[7]) / count:.1f}%",
        "queries come exactly twice": "0",
        "queries come nearly twice": page.tiles["queries come nearly twice"],
        "calls": "300",
        "tokens": "2,100",
    }
    reasons = Counter(item.reason for item in results if isinstance(item, Dropped))
    assert page.cards["Kept, and dropped by reason"] == {"kept": count, **reasons}
    languages = Counter(record.lang or "none given" for record in records)
    assert page.cards["Languages"] == languages
    assert page.cards["Sources"] == Counter(record.source for record in records)
    tasks = Counter(item.labels["task"] for item in results if isinstance(item, Kept))
    assert page.cards["Task"] == tasks
    left_out = sum(n % 3 for n, item in enumerate(results) if isinstance(item, Kept))
    assert page.cards["Left out of the negatives"] == {"copy of another": left_out}
    assert page.cards["All answers that were used"] == {"calls": 300, "prompt tokens": 2100}
    texts = [d.full_text for r in records for d in (*r.positives, *r.negatives)]
    assert histogram(len(r.query) for r in records) <= set(page.cards["Length of queries"])
    assert histogram(map(len, texts)) <= set(page.cards["Length of their documents"])
    for title, numbers in (("Positives", positives), ("Hard negatives", negatives)):
        drawn = page.cards[f"{title} a record"]
        assert {f"{n:,}" for n in Counter(numbers).values()} <= set(drawn)
    drawn = page.cards["Where the teacher finds a query's own document"]
    assert {str(ranks[1]), str(ranks[7]), f"deeper {ranks[0]}"} <= set(drawn)


def test_the_ten_examples_are_records(out):
    page = Page(out.with_name("out.report.html"))
    assert page.tags.count("article") == 10
    report = json.loads(out.with_name("out.report.json").read_text())
    queries = [record.query for record in read_source(out)]
    for example in report["examples"]:
        assert example["query"] in queries
        shown = "".join("\ufffd" if c in "\x00\x1b\x07\x9b\ufffe\u202e\u2067" else c
                        for c in example["query"])  # fmt: skip
        assert shown in page.words


def test_hostile_texts_stay_texts(out):
    page = Page(out.with_name("out.report.html"))
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("title") == page.tags.count("style") - page.tags.count("svg") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    links = [value for _, name, value in page.attributes if name.split(":")[-1] in ("href", "src")]
    assert all(link.startswith("#") for link in links)
    assert not set("\x00\x1b\x07\x9b\ufffe\u202e\u2067\r") & set(page.text)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    right_to_left = [
        tag for tag, name, value in page.attributes if (name, value) == ("dir", "auto")
    ]
    assert {"p", "dd", "th"} <= set(right_to_left)
    assert HOSTILE[0] in page.cards["Kept, and dropped by reason"]


def test_what_a_job_has_not_is_left_out(tmp_path):
    bare = {"kind": "mine", "read": 3, "records": 3}
    page = Page(write_page([("x", bare)], tmp_path / "bare.html", "bare"))
    assert not {"svg", "figure", "article", "details", "h3", "section class"} & set(page.tags)
    assert set(page.tiles) == {
        "read", "kept", "dropped", "kept, of those read", "queries come exactly twice",
        "queries come nearly twice",
    }  # fmt: skip
    alike = bare | {"positives": {"1": 3}, "languages": {"": 3}, "sources": {"a": 3}}
    page = Page(write_page([("x", alike)], tmp_path / "alike.html", "alike"))
    assert page.tiles["positives a record"] == "1"
    assert page.cards == {"Languages": {"none given": 3}}


def test_long_counters_are_cut_and_summed_up(tmp_path):
    counts = {f"l{n}": 100 - n for n in range(SHOWN_NAMES + 9)}
    report = {"kind": "crops", "read": 9, "records": 9, "languages": counts}
    page = Page(write_page([("x", report)], tmp_path / "x.html", "x"))
    shown = dict(list(counts.items())[:SHOWN_NAMES])
    others = sum(counts.values()) - sum(shown.values())
    assert page.cards["Languages"] == {**shown, "9 others": others}
    whole = "x" * 5000
    report |= {"examples": [{"query": whole, "positive": whole}]}
    page = Page(write_page([("x", report)], tmp_path / "x.html", "x"))
    assert max(map(len, page.words[1:])) < 5000  # the first is the style


def test_several_jobs_on_one_page_and_as_json(out, tmp_path):
    other = tmp_path / "other.jsonl"
    with Job(other, "crops", {"seed": 1}) as job:
        job.run([Step(1, [Kept(Record("q", (Document("d"),)), 1)])], 1)
    path = write_run([out, tmp_path / "other.report.json"], tmp_path / "run" / "augment.html")
    page = Page(path)
    assert page.text.count("<h2") == 2
    assert {"out", "other"} <= set(page.words)
    count = len(list(read_source(out)))
    report = json.loads(out.with_name("out.report.json").read_text())
    own = [f"{100 * report['self_retrieval'][name]:.1f}%" for name in ("first", "found")]
    share, near = f"{100 * count / TOTAL:.1f}%", str(report["duplicate_queries"]["near"])
    assert page.rows[1:] == [
        ["out", "test", "300", str(count), share, *own, "0", near, "300", "2,100"],
        ["other", "crops", "1", "1", "100.0%", "100.0%", "100.0%", "0", "0"],
    ]
    anchors = [value for tag, name, value in page.attributes if (tag, name) == ("h2", "id")]
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == [f"#{anchor}" for anchor in anchors]
    jobs = json.loads((tmp_path / "run" / "augment.json").read_text())["jobs"]
    assert jobs == [{"name": n, **read_report(f)[1]} for n, f in (("out", out), ("other", other))]
    same = tmp_path / "out.jsonl"
    work(same)
    twice = Page(write_run([out, same], tmp_path / "twice.html"))
    assert {str(out), str(same)} <= set(twice.words)  # by path, where the names are the same


@pytest.mark.parametrize("name", ["augment.htm", "augment", "out.report.html"])
def test_names_that_cannot_be(out, name):
    before = out.with_name("out.report.json").read_bytes()
    with pytest.raises(UserError, match=rf"{name}: give a name that ends in \.html, not in \.rep"):
        write_run([out], out.with_name(name))
    assert out.with_name("out.report.json").read_bytes() == before
