"""The page in a real Chromium: what people type, what harmful documents try, what is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from drama.retrieve.models import open_model
from tests.serve.browser import Browser, executable
from tests.serve.conftest import DOCUMENTS, SCRIPT, World

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium on this machine")
HITS = "[...document.querySelectorAll('.hit')]"
READY = "document.querySelector('#facts dd') && !document.querySelector('[aria-busy]')"


def drive(steps: Callable[[Browser], Awaitable[None]], address: str) -> None:
    """Run steps in a fresh tab at the page; nothing is complained of, nobody else is asked."""

    async def run() -> None:
        async with Browser() as browser:
            await browser.call("Page.navigate", url=address)
            await browser.wait_for(READY)
            await steps(browser)
            assert browser.problems == []
            outside = [
                url for url in browser.requests if not url.startswith((address[:21], "data:"))
            ]
            assert outside == []
            assert await browser.evaluate("document.title") != "owned"

    asyncio.run(run())


def test_a_search_by_keyboard_the_address_and_back(address: str) -> None:
    async def steps(browser: Browser) -> None:
        assert await browser.evaluate("document.activeElement.id") == "question"
        await browser.type("bread yeast")
        await browser.press("Enter")
        await browser.wait_for(f"{HITS}.length === 6 && {READY}")
        assert await browser.evaluate("location.search") == "?q=bread+yeast&k=10&dim=64"
        ids = await browser.evaluate(f"{HITS}.map(h => h.querySelector('.id').textContent)")
        assert sorted(ids) == sorted(id_ for id_, _, _ in DOCUMENTS)
        scores = await browser.evaluate(f"{HITS}.map(h => +h.querySelector('.score').textContent)")
        assert scores == sorted(scores, reverse=True)
        marks = await browser.evaluate(
            f"{HITS}[{ids.index('b1')}].querySelectorAll('.snippet mark').length && "
            f"[...{HITS}[{ids.index('b1')}].querySelectorAll('mark')].map(m => m.textContent)"
        )
        assert marks == ["Bread", "bread", "yeast"]  # after letters outside the basic plane
        for word in ("6 results", "tokenise", "encode", "search", "snippet"):
            assert word in await browser.evaluate("document.getElementById('timing').textContent")
        await browser.evaluate("document.getElementById('question').value = ''")
        await browser.type("bees")
        await browser.press("Enter")
        await browser.wait_for("document.title.startsWith('bees')")
        await browser.evaluate("history.back()")
        await browser.wait_for("document.title.startsWith('bread yeast')")
        assert await browser.evaluate("document.getElementById('question').value") == "bread yeast"

    drive(steps, f"{address}/")


def test_a_width_and_a_number_in_the_address(address: str) -> None:
    async def steps(browser: Browser) -> None:
        await browser.wait_for(f"{HITS}.length === 5")
        assert await browser.evaluate("document.getElementById('dim').value") == "16"

    drive(steps, f"{address}/?q=bread&k=5&dim=16")


def test_harmful_documents_are_shown_as_text(address: str) -> None:
    async def steps(browser: Browser) -> None:
        await browser.wait_for(f"{HITS}.length === 6")
        titles = await browser.evaluate(f"{HITS}.map(h => h.querySelector('h3')?.textContent)")
        assert {SCRIPT, DOCUMENTS[4][1]} <= set(titles)
        assert await browser.evaluate("document.querySelectorAll('#hits img, #hits b').length") == 0
        await browser.evaluate(
            "document.querySelectorAll('#hits details').forEach(box => { box.open = true; })"
        )
        await browser.wait_for(
            "[...document.querySelectorAll('.whole')].every(text => text.textContent)"
        )
        texts = await browser.evaluate(
            "[...document.querySelectorAll('.whole')].map(text => text.textContent)"
        )
        assert sorted(texts) == sorted(text for _, _, text in DOCUMENTS)

    drive(steps, f"{address}/?q=bread")


def test_a_question_of_a_megabyte_and_one_that_is_too_long(address: str) -> None:
    async def steps(browser: Browser) -> None:
        box = "document.getElementById('question')"
        await browser.evaluate(f"{box}.value = '<b>' + 'x '.repeat(490000)")
        await browser.press("Enter")
        await browser.wait_for(f"{HITS}.length === 6")
        assert await browser.evaluate("location.search") == ""
        await browser.evaluate(f"{box}.value = 'x'.repeat(1000001)")
        await browser.press("Enter")
        await browser.wait_for("!document.getElementById('alert').hidden")
        said = await browser.evaluate("document.getElementById('alert').textContent")
        assert said == "'q' has 1,000,001 characters; 1,000,000 are the most"
        assert [problem for problem in browser.problems if "413" not in problem] == []
        browser.problems.clear()  # Chromium's own line about the 413

    drive(steps, f"{address}/")


def test_texts_are_compared(address: str, world: World) -> None:
    async def steps(browser: Browser) -> None:
        await browser.evaluate("document.getElementById('tab-search').focus()")
        await browser.press("ArrowRight")
        assert await browser.evaluate("document.activeElement.id") == "tab-compare"
        for _ in range(5):
            await browser.evaluate("document.getElementById('add').click()")
            await browser.type("bread")
        assert await browser.evaluate("document.getElementById('add').disabled") is True
        texts = await browser.evaluate(
            "[...document.querySelectorAll('textarea')].map(t => t.value)"
        )
        await browser.evaluate("document.querySelector('#compare .main').click()")
        await browser.wait_for("document.querySelectorAll('#matrix th').length === 16")
        cells = await browser.evaluate(
            "[...document.querySelectorAll('#matrix tr + tr td')].map(cell => +cell.textContent)"
        )
        model = open_model(world.model)
        q_BD, d_BD = model.encode(texts[:1], "query"), model.encode(texts[1:], "document")
        want = [float(v @ w) for v in (*q_BD, *d_BD) for w in (*q_BD, *d_BD)]
        assert max(abs(a - b) for a, b in zip(cells, want, strict=True)) < 0.0051

    drive(steps, f"{address}/")


def test_nothing_breaks_on_a_phone(address: str) -> None:
    async def steps(browser: Browser) -> None:
        await browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=400, height=800, deviceScaleFactor=1, mobile=True,
        )  # fmt: skip
        await browser.wait_for(f"{HITS}.length === 6")
        assert await browser.evaluate("document.documentElement.scrollWidth") == 400
        unnamed = await browser.evaluate(
            "[...document.querySelectorAll('input, select, textarea')].filter("
            "box => !box.labels?.length && !box.getAttribute('aria-label')).length"
        )
        assert unnamed == 0

    drive(steps, f"{address}/?q=bread")
