"""The page in a real browser: asking, stopping, errors, and that it connects to nothing else.

Needs playwright (from the extra `dev`) and a Chromium, looked for under its usual names or at GISTRAG_BROWSER.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.live_server import TEXTS, build, serving

from gistrag.answering import judge
from gistrag.answering.confidence import Again, Calibration, logit
from gistrag.engine import Engine
from gistrag.index.gist_worker import GistWorker
from gistrag.model.gist_model import GistModel
from gistrag.rag import GistRAG
from gistrag.server.auth import ALL, digest
from gistrag.server.folders import Folders

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
BROWSER = os.environ.get("GISTRAG_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser; apt-get install chromium, or set GISTRAG_BROWSER")

WAIT_MS = 60_000
EVIL = (
    '<img src="http://evil.example/a.png"> ![b](http://evil.example/b.png) [c](http://evil.example) <script>x</script>'
)
EVIL_SHOWN = '<img src="http://evil.example/a.png"> b c <script>x</script>'
"""What a line of Markdown shows of it."""
HOSTILE = """# Title <b onclick="location='http://evil.example'">x</b>

<script>document.title = 'owned'</script>
<style>body { display: none }</style>
<iframe src="http://evil.example"></iframe><form action="http://evil.example"><input></form>

- [run](javascript:document.title='owned') [data](data:text/html,x) <http://evil.example/auto> www.evil.example
- ![remote](http://evil.example/b.png) ![x](<x" onerror=document.title>)
- <a href="javascript:1" onmouseover="document.title='owned'">y</a><svg onload="document.title='owned'"></svg>

| a | <img src=x onerror="document.title='owned'"> |
|---|:--:|
| `<base href="http://evil.example/">` | &lt;script&gt; <br> **bold** |

```html" onload="document.title='owned'
<meta http-equiv="refresh" content="0;url=http://evil.example">
```

[run]: javascript:document.title='owned'
"""

CONTRAST = """() => {
  const channel = (part) => {
    const value = part / 255;
    return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  };
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    const colour = getComputedStyle(one).backgroundColor;
    return /, 0\\)$/.test(colour) ? ground(one.parentElement) : colour;
  };
  const contrast = (one) => {
    const [a, b] = [light(getComputedStyle(one).color), light(ground(one))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  return [...document.querySelectorAll("h1, h2, p, span, b, u, a, mark, small, button, select, blockquote, summary")]
    .filter((one) => one.checkVisibility() && one.textContent.trim() && !one.children.length && contrast(one) < 4.5)
    .map((one) => `${one.tagName} ${one.className} ${one.textContent}`);
}"""
"""Finds text with a contrast below 4.5 (WCAG AA)."""

LONG = "The mill " + "stands by the river and " * 90 + "has 2 stones."
ARABIC = "تستهلك المضخة 80 لترا."
FOCUSED = """() => [document.activeElement]
  .map((one) => one.id || one.value || one.hash || one.textContent)[0]"""
Say = Callable[..., None]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[str]:
    """The address of a server of three indexes: two documents, none, and a malicious one."""
    made = {
        "manual": build(tmp_path_factory.mktemp("manual"), engine),
        "empty": build(tmp_path_factory.mktemp("empty"), engine, {}),
        "evil": build(tmp_path_factory.mktemp("evil"), engine, {"evil.txt": EVIL}),
    }
    with serving(made, engine) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The open page; in the end it must have sent no request elsewhere and logged no warning."""
    with opened(browser, address) as shown:
        yield shown


@contextmanager
def opened(browser: Any, address: str, *, tolerated: str = "never", **options: Any) -> Iterator[Any]:
    """Yield the page at an address; a request elsewhere, a script error or a warning on the console is a failure.

    Args:
        tolerated: part of a warning that the test expects.
        options: of the browser's context, such as its width.
    """
    wrong: list[str] = []
    origin = address.partition("/#")[0]

    def hear(message: Any) -> None:
        if message.type in ("error", "warning") and tolerated not in message.text:
            wrong.append(message.text)

    def see(request: Any) -> None:
        if not request.url.startswith((origin, "data:", "blob:")):
            wrong.append(request.url)

    context = browser.new_context(**options)
    try:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("request", see)
        page.on("console", hear)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        yield page
    finally:
        context.close()
    assert wrong == []


@pytest.fixture
def say(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let the model generate a given text, a letter at a time."""

    def be_told(text: str, *, pause_s: float = 0.0) -> None:
        def letters(*given: object, **options: object) -> Iterator[int]:
            for token in model.encode(text):
                time.sleep(pause_s)
                yield token

        monkeypatch.setattr(judge, "generate_steps", letters)

    return be_told


def ask(page: Any, question: str) -> Any:
    """Type a question, press Enter, and return the element of the answer."""
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    return page.locator("article").last


def ready(page: Any) -> Any:
    """Return the page when it has loaded the index."""
    page.locator("#facts:not(:empty)").wait_for()
    return page


def test_ask(page: Any, say: Say) -> None:
    """An answer shows its evidence, sources and costs, and a click shows a passage; without confidence, no verdict."""
    say("In combs of wax.")

    entry = ask(ready(page), "Where is the honey?")
    entry.locator(".cost").wait_for()

    assert entry.locator("h2").inner_text() == "Where is the honey?"
    assert entry.locator(".answer").inner_text() == "In combs of wax.\u00a0[1]"
    assert entry.get_attribute("aria-busy") == "false"
    assert entry.locator("blockquote").inner_text() == "Honey is kept in combs of wax for winter."
    assert entry.locator(".evidence a").inner_text() == "bees.md, Bees > Honey"
    assert entry.locator(".verdict, .searched, .note").count() == 0
    assert "of text" in entry.locator(".cost").inner_text()
    assert "to the first word" in entry.locator(".cost").inner_text()

    assert entry.locator(".sources").is_hidden()
    entry.get_by_text("2 sources: bees.md, Bees > Honey · mills.md, Mills").click()
    assert entry.locator(".place").all_inner_texts() == ["bees.md, Bees > Honey", "mills.md, Mills"]
    assert entry.locator(".snippet").nth(0).inner_text().startswith("Bees Bees gather nectar in spring. Honey Honey")
    assert entry.locator(".how").all_inner_texts() == ["gists"] * 3
    entry.locator(".sources a").nth(1).click()
    passage = page.get_by_role("dialog", name="mills.md")
    passage.wait_for()
    assert "stands by the river" in passage.inner_text()
    assert passage.locator("mark").count() == 0
    assert "#passage/manual/" in page.url
    page.keyboard.press("Escape")
    passage.wait_for(state="hidden")
    page.wait_for_url(lambda url: "#" not in url)  # other ways to wait use eval, which the page forbids


def calibrated(engine: Engine, confidence: float) -> Engine:
    """Return an engine that gives every answer this confidence: sure from 0.8, not found below 0.3."""
    bias = logit(confidence)
    calibration = Calibration("a", (), {}, bias, Again(), sure=0.8, found=0.3, doubtful=0.0, measured={})
    return dataclasses.replace(engine, calibration=calibration)


def replied(page: Any, text: str, sources: list[dict[str, Any]], **details: Any) -> None:
    """Let the server answer the next question with a text, its sources and what is thought of it."""
    known = {"chunk_id": 1, "as_text": False, "place": "bees.md, Bees", "snippet": "# Bees", "evidence": None}
    judged = {"searched": "", "confidence": None, "verdict": None, "unsupported": [], "withheld": "", **details}
    timings = {"ttft_s": 0.1, "total_s": 0.2}
    usage = {"gist_slots": 8, "source_tokens": 32, "text_tokens": 1000, "readings": 3, "dropped_chunks": 20}
    last = {**judged, "sources": [known | one for one in sources], "timings": timings, "usage": usage}
    lines = [
        {"choices": [{"delta": {"content": text}}]},
        {"choices": [{"delta": {}}], "gistrag": last},
    ]
    body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda one: one.fulfill(content_type="text/event-stream", body=body))


def carried(sentence: str, *, start: int = 0) -> dict[str, Any]:
    """Return what is special about a source that carries an answer."""
    return {"evidence": {"start": start, "end": start + len(sentence), "text": sentence, "heading": [], "page": None}}


@pytest.mark.parametrize(
    ("confidence", "answer", "verdict"),
    [
        (0.9, "In combs of wax.", "Sure. 90 % likely to be right."),
        (0.5, "In combs of wax.", "Not sure. 50 % likely to be right. The passage says:"),
        (
            0.1,
            "In combs.",
            "Not found. 10 % likely to be right. The model guessed “In combs.”, which is probably wrong, from:",
        ),
        (0.9, "The passages do not say.", "Not found."),
    ],
)
def test_how_sure_an_answer_is(
    browser: Any, tmp_path: Path, engine: Engine, say: Say, confidence: float, answer: str, verdict: str
) -> None:
    """A line under the answer says it, for screen readers with the percentage; unsure, the evidence comes first."""
    say(answer)

    with (
        serving({"manual": build(tmp_path, engine)}, calibrated(engine, confidence)) as url,
        opened(browser, url) as page,
    ):
        entry = ask(ready(page), "Where is the honey?")
        entry.locator(".cost").wait_for()

        order = entry.evaluate("(all) => [...all.children].map((one) => one.classList[0]).filter(Boolean)")
        assert entry.locator(".verdict").text_content() == verdict
        assert verdict in page.locator("#status").inner_text()
        assert (order.index("verdict") < order.index("answer")) == ("Not sure" in verdict)
        assert entry.locator("blockquote").count() == (verdict != "Not found.")
        assert entry.locator(".cite").all_inner_texts() == ([] if verdict.startswith("Not found") else ["[1]"])
        assert entry.locator(".others").get_attribute("open") is None


def test_the_evidence_opens_highlighted(page: Any, say: Say) -> None:
    """Its link, and its number in the answer, open the passage at that sentence, which has the focus."""
    say("combs of wax")
    entry = ask(ready(page), "Where is the honey?")
    entry.get_by_role("link", name="Open source 1").click()
    highlighted = page.locator("#passage mark")
    highlighted.wait_for()

    assert entry.locator("blockquote b").all_inner_texts() == ["combs of wax"]
    assert highlighted.inner_text() == "Honey is kept in combs of wax for winter."
    assert page.locator("#passage h3").inner_text() == "Bees"
    assert page.evaluate("() => document.activeElement.tagName") == "MARK"
    assert entry.locator(".evidence a").get_attribute("href") == "#passage/manual/1/49-90"
    assert page.url.partition("#passage/")[2] == "manual/1/49-90"
    page.reload()
    highlighted.wait_for()


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ("0-6", ["Bees"]),
        ("0-9999", ["Bees", "Bees gather nectar in spring.", "Honey", "Honey is kept in combs of wax for winter."]),
        ("500-900", []),
        ("7-7", []),
        ("9-7", []),
        ("x-7", None),
    ],
)
def test_a_highlight_at_the_edges_of_a_passage(page: Any, span: str, expected: list[str] | None) -> None:
    """A span is cut at the edges of the passage; one outside of it, or one that is none, highlights nothing."""
    ready(page).evaluate("(hash) => { location.hash = hash; }", f"#passage/manual/1/{span}")
    if expected is None:
        page.wait_for_timeout(200)
        assert page.locator("#passage[open]").count() == 0
        return
    page.locator("#passage .body").filter(has_text="Honey").wait_for()

    assert page.locator("#passage h3").inner_text() == "Bees"
    assert page.locator("#passage mark").all_inner_texts() == expected


def test_positions_count_characters(browser: Any, tmp_path: Path, engine: Engine, say: Say) -> None:
    """Characters beyond 16 bits before the evidence do not shift what is highlighted."""
    say("In wax.")
    index = build(tmp_path, engine, {"bees.md": "Bees 🐝🐝🐝 hum.\n\nHoney is kept in wax 🍯 for winter.\n"})

    with serving({"manual": index}, engine) as url, opened(browser, url) as page:
        ask(ready(page), "Where is the honey?").locator(".evidence a").click()
        page.locator("#passage mark").wait_for()
        assert page.locator("#passage mark").inner_text() == "Honey is kept in wax 🍯 for winter."


def test_what_stands_in_no_passage_is_underlined(page: Any) -> None:
    """Names and numbers are underlined where they are whole words, and named in a line that is announced."""
    details = {"unsupported": ["90", "Lee", "a.*b"], "verdict": "unsure", "confidence": 0.4}
    replied(ready(page), "Lee took 90km to Leeds, not 190 or 900.", [carried("A sentence.")], **details)

    entry = ask(page, "Who?")
    entry.locator(".cost").wait_for()

    assert entry.locator(".answer u").all_inner_texts() == ["Lee", "90"]
    assert entry.locator(".answer").inner_text() == "Lee took 90km to Leeds, not 190 or 900.\u00a0[1]"
    assert entry.locator(".note").all_inner_texts() == ["The model answers:", "In no passage: 90, Lee, a.*b."]
    assert "In no passage: 90, Lee" in page.locator("#status").inner_text()


@pytest.mark.parametrize("sentence", [EVIL, LONG, ARABIC, "", "| a | *b* | (c) [d] \\ |"])
def test_any_sentence_can_be_quoted(page: Any, sentence: str) -> None:
    """Markup stays text, a long sentence keeps the page short, and text from right to left stands on the right."""
    replied(ready(page), sentence or "80", [{}, carried(sentence)], verdict="answered", confidence=0.9)

    entry = ask(page, "What?")
    entry.locator(".cost").wait_for()

    quoted = entry.locator("blockquote")
    assert quoted.text_content() == sentence
    assert quoted.evaluate("(one) => getComputedStyle(one).direction") == ("rtl" if sentence == ARABIC else "ltr")
    assert quoted.evaluate("(one) => one.clientHeight") < 200
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_an_answer_without_evidence_lists_its_sources(page: Any) -> None:
    """One line names them, and nothing is quoted or numbered in the answer."""
    replied(ready(page), "Bees.", [{}], verdict="unsure", confidence=0.4)

    entry = ask(page, "What?")
    entry.locator(".cost").wait_for()

    assert entry.locator(".verdict").text_content() == "Not sure. 40 % likely to be right."
    assert entry.locator(".evidence, .cite").count() == 0
    assert entry.locator(".others summary").inner_text() == "1 source: bees.md, Bees"


def test_what_was_searched_is_shown(page: Any, say: Say) -> None:
    """A follow-up shows the question it was joined with; a question in full shows nothing of the kind."""
    say("By the river.")
    first = ask(ready(page), "Where is the mill?")
    first.locator(".cost").wait_for()
    second = ask(page, "And what does it do?")
    second.locator(".cost").wait_for()

    assert page.locator(".searched").count() == 1
    assert second.locator(".searched").inner_text() == "Searched: Where is the mill? And what does it do?"
    assert "Searched: Where is the mill?" in page.locator("#status").inner_text()


def test_a_document_in_short_opens_like_a_passage(page: Any) -> None:
    """What answers a question about a whole document is no passage of it, and opens all the same."""
    ready(page).get_by_role("button", name="2 documents").click()
    page.get_by_role("button", name="mills.md").click()
    entry = ask(page, "What is this document about?")
    entry.locator(".others summary").click()
    entry.locator(".sources a").click()
    page.get_by_role("dialog", name="mills.md").wait_for()

    assert entry.locator(".verdict, .evidence").count() == 0
    assert "#passage/manual/-" in page.url
    assert "stands by the river" in page.locator("#passage .body").inner_text()


def test_gists_that_are_still_to_be_made(
    browser: Any, tmp_path: Path, engine: Engine, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page says how far the gists are, follows them while they are made, and what was read as text meanwhile."""
    say("In combs of wax.")
    index = build(tmp_path, engine, gists="none")
    monkeypatch.setattr(GistWorker, "_is_running", lambda worker: True)

    with serving({"manual": index}, engine) as url, opened(browser, url) as page:
        page.locator("#facts", has_text="Gists made of 0 of 2 passages.").wait_for()
        entry = ask(page, "Where is the honey?")
        entry.locator(".cost").wait_for()
        assert "2 passages read as text: the gists are still to be made" in entry.locator(".cost").inner_text()
        GistRAG.from_folder(tmp_path / "docs", index=index, engine=engine, gists="now").close()
        page.get_by_text("Gists made").first.wait_for(state="detached")


def test_modes_and_documents(page: Any, say: Say) -> None:
    """The page chooses the mode and the document of a question."""
    say("It grinds.")
    ready(page).get_by_role("radio", name="Text").check()
    page.get_by_role("button", name="2 documents").click()
    page.get_by_label("Filter documents").fill("mill")
    page.get_by_role("button", name="mills.md").click()

    entry = ask(page, "What does it do?")
    entry.locator(".cost").wait_for()

    assert entry.locator(".evidence a").inner_text() == "mills.md, Mills"
    assert entry.locator(".evidence .how").all_inner_texts() == ["text"]
    assert "only in mills.md" in entry.locator("h2").inner_text()
    assert "read as text" in entry.locator(".cost").inner_text()
    page.get_by_role("button", name="Searching only in mills.md").click()
    assert page.locator("#scope").is_hidden()


def test_stop(page: Any, say: Say) -> None:
    """An answer appears while it is generated; the button and Escape stop it."""
    say("on and on and on " * 20, pause_s=0.02)
    ready(page)

    for act in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        entry = ask(page, "How long?")
        entry.locator(".answer", has_text="on").wait_for()
        assert entry.get_attribute("aria-busy") == "true"
        act()
        entry.get_by_text("Stopped.").wait_for()
        assert 0 < len(entry.locator(".answer").inner_text()) < 300

    say("Again.")
    ask(page, "And now?").locator(".answer", has_text="Again.").wait_for()


def test_an_error_is_shown(browser: Any, address: str, say: Say) -> None:
    """An error appears in place of the answer, and the next question is answered."""
    say("Fine.")
    with opened(browser, address, tolerated="status of 400") as page:
        alarm = ask(ready(page), "why " * 500).get_by_role("alert")
        alarm.wait_for()

        assert "the model's context window has 1024" in alarm.inner_text()
        ask(page, "Why?").locator(".answer", has_text="Fine.").wait_for()


def test_an_empty_index_says_what_to_do(page: Any) -> None:
    """Without documents, the page says so, and so does an answer."""
    ready(page).get_by_label("Index").select_option("empty")
    page.locator("#facts", has_text="This index has no documents yet").wait_for()

    ask(page, "Anything?").locator(".answer", has_text="There are no documents").wait_for()
    assert page.locator(".sources").count() == 0


def test_an_index_that_does_not_open_says_so(browser: Any, address: str, say: Say) -> None:
    """An index that cannot be opened shows its error, and the questions to the index before are gone."""
    say("Fine.")
    with opened(browser, address, tolerated="status of 429") as page:
        ask(ready(page), "Why?").locator(".answer", has_text="Fine.").wait_for()
        page.route(
            "**/v1/documents?model=evil", lambda one: one.fulfill(status=429, json={"error": {"message": "full"}})
        )
        page.get_by_label("Index").select_option("evil")
        page.get_by_role("alert").filter(has_text="full").wait_for()
        assert page.locator("article").count() == 0


def test_an_answer_stays_while_the_index_opens(page: Any, say: Say) -> None:
    """A question may be asked before the list of documents arrives."""
    say("Fine.")
    held: list[Any] = []
    page.route("**/v1/documents?model=evil", lambda one: held.append(one))
    ready(page).get_by_label("Index").select_option("evil")
    entry = ask(page, "Why?")
    entry.locator(".answer", has_text="Fine.").wait_for()
    held[0].continue_()
    page.locator("#show-documents", has_text="1 document").wait_for()

    assert entry.locator(".answer").inner_text().startswith("Fine.")


def test_no_text_becomes_markup(page: Any, say: Say) -> None:
    """Images, links and scripts in answers and documents stay text; no other host gets a request."""
    say(EVIL)
    ready(page).get_by_label("Index").select_option("evil")
    page.locator("#facts", has_text="1 document in").wait_for()

    entry = ask(page, EVIL)
    entry.locator(".evidence a").click()
    page.get_by_role("dialog").wait_for()

    assert entry.locator("h2").inner_text() == EVIL
    assert entry.locator(".answer").inner_text() == EVIL_SHOWN + "\u00a0[1]"
    assert page.locator("#passage .plain").inner_text() == EVIL
    assert page.locator("main img, dialog img, main script, dialog script").count() == 0
    links = page.locator("main a, dialog a").evaluate_all("(links) => links.map((one) => one.getAttribute('href'))")
    assert all(link.startswith("#passage/") for link in links)


def test_markdown_is_shown(browser: Any, tmp_path: Path, engine: Engine, say: Say) -> None:
    """Headings, emphasis, lists, tables and code are elements in answers and passages; the evidence is marked."""
    say("1. **Wax** is `kept`\n2. 9~18 or 10~12\n\n| a | b |\n|---|--:|\n| 1 | 2 |")
    text = "# Bees\n\nHoney is *kept* in\n**combs** of wax. More.\n\n| part | of |\n|---|---|\n| wax | comb |\n"
    index = build(tmp_path, engine, {"bees.md": text, "bees.py": "# Bees\n__all__ = ['honey']\n"})

    with serving({"manual": index}, engine) as url, opened(browser, url) as page:
        answer = ask(ready(page), "Where is the honey?").locator(".answer")
        answer.locator(".cite").wait_for()
        assert answer.locator("li").all_inner_texts() == ["Wax is kept", "9~18 or 10~12"]
        assert [answer.locator(one).inner_text() for one in ("strong", "code", "th >> nth=1")] == ["Wax", "kept", "b"]
        for span, expected in (
            ("8-44", ["Honey is ", "kept", " in\n", "combs", " of wax."]),
            ("76-90", ["wax", "comb"]),
            ("14-21", ["is ", "kep"]),
        ):
            page.evaluate("(hash) => { location.hash = hash; }", f"#passage/manual/1/{span}")
            page.locator("#passage mark", has_text=re.compile(rf"^\s*{expected[0].strip()}\s*$")).first.wait_for()
            assert page.locator("#passage mark").evaluate_all("(all) => all.map((one) => one.textContent)") == expected
        page.evaluate("() => { location.hash = '#passage/manual/2/0-6'; }")
        page.locator("#passage .plain").wait_for()
        assert page.locator("#passage .plain").inner_text() == "# Bees\n__all__ = ['honey']"
        assert page.locator("#passage mark").inner_text() == "# Bees"


@pytest.mark.parametrize(
    "answer", ["1986.", "# 1 and - 2", "- none", "5 * 3 * 2 = 30", "snake_case_name", "a < b && c"]
)
def test_an_answer_of_one_line_stays_as_it_is(page: Any, answer: str) -> None:
    """A year with a full stop is no list, and a product is not emphasis."""
    replied(ready(page), answer, [{}])

    entry = ask(page, "When?")
    entry.locator(".cost").wait_for()

    assert entry.locator(".answer").inner_text() == answer


def test_hostile_markdown_does_nothing(browser: Any, tmp_path: Path, engine: Engine, say: Say) -> None:
    """Script, handlers, styles, frames, forms, links and remote images do nothing; no other host gets a request."""
    say(HOSTILE)
    with (
        serving({"manual": build(tmp_path, engine, {"evil.md": HOSTILE})}, engine) as url,
        opened(browser, url) as page,
    ):
        entry = ask(ready(page), "What?")
        entry.locator(".cost").wait_for()
        firsts, shown = ["Title", "iframe", "run data", "onmouseover", "base href", "http-equiv"], []
        for number in range(1, 7):
            page.evaluate("(hash) => { location.hash = hash; }", f"#passage/manual/{number}")
            page.locator("#passage .body", has_text=firsts[number - 1]).wait_for()
            shown.append(page.locator("#passage .body").inner_text())
            tags, names = page.locator(".answer *, blockquote *, .snippet *, #passage .body *").evaluate_all(
                "(all) => [all.map((one) => one.tagName), all.flatMap((one) => one.getAttributeNames())]"
            )
            assert not {"SCRIPT", "STYLE", "IFRAME", "FORM", "INPUT", "IMG", "svg", "BASE", "META"} & set(tags)
            assert set(names) <= {"class", "title", "align", "href", "aria-label", "start"}
            assert page.locator("#passage .body a").count() == 0

        assert page.title() == "gistrag"
        assert "<script>document.title = 'owned'</script>" in shown[0]
        assert shown[2] == "run data http://evil.example/auto www.evil.example\nremote x"
        assert "bold" in shown[4]


def test_the_sanitizer_stands_by_itself(browser: Any, address: str) -> None:
    """What the renderer let through would be stopped by DOMPurify, and then by the browser's policy."""
    hostile = (
        '<p style="color:red" onclick="x()">a<img src="http://evil.example/c.png" onerror="x()"><script>x</script></p>'
        '<a href="javascript:x()">b</a><form><input></form><svg><style>@import "http://evil.example"</style></svg>'
    )
    with opened(browser, address, tolerated="") as page:  # the browser reports all that it stops
        shown = ready(page).evaluate(
            """async (markup) => {
              const { safe } = await import("/static/markdown.js");
              const shown = safe(markup).innerHTML;
              try { document.body.insertAdjacentHTML("beforeend", markup); }
              catch (error) { return [shown, error.name]; }
            }""",
            hostile,
        )

    assert shown == ["<p>a</p>b", "TypeError"]


def answered(page: Any, question: str) -> Any:
    """Ask a question, wait for its complete answer, and return its element."""
    entry = ask(page, question)
    entry.locator(".cost").wait_for()
    return entry


def test_a_conversation_stays_in_the_browser(page: Any, say: Say) -> None:
    """A reload shows it again, a new chat leaves it in the list, and a follow-up in it leans on its questions."""
    say("By the **river**.")
    answered(ready(page), "Where is the mill?")
    before = page.locator("#conversation").inner_text()
    page.reload()
    page.locator("article .cost").wait_for()
    assert page.locator("#conversation").inner_text() == before
    assert page.locator("#welcome").is_hidden()

    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0
    answered(page, "Where is the honey?")
    page.get_by_role("button", name="Chats").click()
    assert page.locator("#chats li b").all_inner_texts() == ["Where is the honey?", "Where is the mill?"]
    page.get_by_role("button", name="Where is the mill?").first.click()
    entry = answered(page, "And what does it do?")
    assert entry.locator(".searched").inner_text() == "Searched: Where is the mill? And what does it do?"
    assert page.locator("article").count() == 2


def test_the_server_gets_questions_only(page: Any, say: Say) -> None:
    """A request carries the questions it may lean on, six at most, and no answer."""
    say("Yes.")
    sent: list[Any] = []
    page.on("request", lambda one: sent.append(one.post_data_json) if one.post_data else None)
    ready(page)
    for number in range(8):
        answered(page, f"Question {number}?")

    assert sent[-1]["messages"] == [{"role": "user", "content": f"Question {number}?"} for number in range(1, 8)]


def test_chats_are_forgotten(page: Any, say: Say) -> None:
    """One by its cross, all by a button that asks first; then the browser keeps none of them."""
    say("Yes.")
    answered(ready(page), "One?")
    page.get_by_role("button", name="New chat").click()
    answered(page, "Two?")
    page.get_by_role("button", name="Chats").click()
    page.get_by_role("button", name="Forget One?").click()
    assert page.locator("#chats li b").all_inner_texts() == ["Two?"]
    page.once("dialog", lambda one: one.dismiss())
    page.get_by_role("button", name="Forget all").click()
    assert page.locator("article").count() == 1
    page.once("dialog", lambda one: one.accept())
    page.get_by_role("button", name="Forget all").click()

    page.get_by_text("No chats yet.").wait_for()
    assert page.locator("article").count() == 0
    assert page.evaluate("() => localStorage.length") == 0


@pytest.mark.parametrize("kept", ["{", "null", '{"turns": 1}', '{"turns": []}', '{"index": "gone", "turns": [{}]}'])
def test_a_broken_chat_is_left_out(page: Any, kept: str) -> None:
    """What the browser keeps may be damaged, or of an index that is gone: the page opens without it."""
    ready(page).evaluate("(kept) => { localStorage['gistrag.chat.1'] = kept; sessionStorage.chat = '1'; }", kept)
    page.reload()
    ready(page).get_by_role("button", name="Chats").click()

    page.get_by_text("No chats yet.").wait_for()


def test_a_full_browser_forgets_the_oldest(page: Any, say: Say) -> None:
    """Where there is no room for a conversation, the oldest others go."""
    say("Yes.")
    turn = {"question": "q", "text": "x" * 2_000_000, "details": None}
    ready(page).evaluate(
        "(chat) => { for (const id of ['1', '2']) localStorage['gistrag.chat.' + id] = JSON.stringify(chat); }",
        {"index": "manual", "turns": [turn]},
    )
    replied(page, "y" * 2_000_000, [{}])
    answered(page, "Long?")

    kept = page.evaluate("() => Object.keys(localStorage)")
    assert len(kept) == 2
    assert "gistrag.chat.1" not in kept


def test_copy_and_export(browser: Any, address: str, say: Say) -> None:
    """An answer is copied as it was written; a conversation is a file of Markdown, with sources and evidence."""
    say("In **combs**\nof wax.")
    with opened(browser, address, permissions=["clipboard-read", "clipboard-write"]) as page:
        entry = answered(ready(page), "Where is the honey?")
        entry.get_by_role("button", name="Copy").click()
        entry.get_by_role("button", name="Copied").wait_for()
        page.get_by_role("button", name="Chats").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Export this chat").click()

        assert page.evaluate("() => navigator.clipboard.readText()") == "In **combs**\nof wax."
        assert re.fullmatch(r"gistrag-[\d-]{10}\.md", download.value.suggested_filename)
        written = Path(download.value.path()).read_text("utf-8")
        assert written.startswith("# Where is the honey?\n\nmanual, ")
        assert written.endswith(
            "\n\n## Where is the honey?\n\nIn **combs**\nof wax.\n\n> Honey is kept in combs of wax for winter.\n\n"
            "1. bees.md, Bees > Honey\n2. mills.md, Mills\n"
        )


def test_copying_works_over_plain_http(page: Any, say: Say) -> None:
    """From another machine over plain HTTP there is no clipboard for scripts, and the browser copies the old way."""
    say("Wax.")
    page.add_init_script(
        "delete Navigator.prototype.clipboard; document.execCommand = (what) => { window.did = what; };"
    )
    page.reload()
    answered(ready(page), "Where?").get_by_role("button", name="Copy").click()

    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("() => window.did") == "copy"
    assert page.locator("textarea").count() == 1


def test_try_again(page: Any, say: Say) -> None:
    """The last question is asked once more, in the mode chosen now; its new answer takes the place of the old one."""
    say("One.")
    answered(ready(page), "First?")
    assert page.get_by_role("button", name="Try again").count() == 1
    answered(page, "Where is the mill?")
    assert page.get_by_role("button", name="Try again").count() == 1
    say("Two.")
    page.get_by_role("radio", name="Text").check()
    page.get_by_role("button", name="Try again").click()
    page.locator(".answer", has_text="Two.").wait_for()
    page.locator("article").last.locator(".cost").wait_for()

    assert page.locator("article h2").all_inner_texts() == ["First?", "Where is the mill?"]
    assert page.locator("article").last.locator(".evidence .how").inner_text() == "text"


def test_a_failed_question_can_be_asked_again(browser: Any, address: str, say: Say) -> None:
    """It stands in the box again, and in the error is a button that asks it once more."""
    say("Fine.")
    with opened(browser, address, tolerated="ERR_FAILED") as page:
        ready(page).route("**/v1/chat/completions", lambda one: one.abort())
        ask(page, "Why?").get_by_role("alert").wait_for()
        box = page.get_by_label("Question", exact=True)
        assert box.input_value() == "Why?"
        page.unroute("**/v1/chat/completions")
        page.get_by_role("button", name="Try again").click()
        page.locator(".answer", has_text="Fine.").wait_for()

        assert page.get_by_role("alert").count() == 0
        assert page.locator("article").count() == 1
        assert box.input_value() == ""


def test_arrow_up_brings_the_last_question(page: Any, say: Say) -> None:
    """In the empty box only; once more brings the one before, arrow down comes back."""
    say("Yes.")
    for question in ("One?", "Two?"):
        answered(ready(page) if question == "One?" else page, question)
    box = page.get_by_label("Question", exact=True)
    seen = []
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "ArrowDown", "ArrowDown", "ArrowDown"):
        box.press(key)
        seen.append(box.input_value())

    assert seen == ["Two?", "One?", "One?", "Two?", "", ""]
    box.fill("new")
    box.press("ArrowUp")
    assert box.input_value() == "new"


def test_the_empty_page_suggests_questions(page: Any, say: Say) -> None:
    """They come from titles and headings of the index, and a click asks one."""
    say("It grinds.")
    examples = ready(page).locator("#examples button")
    assert examples.all_inner_texts() == ["What is “Bees” about?", "What is “Mills” about?"]
    examples.nth(1).click()
    entry = page.locator("article")
    entry.locator(".cost").wait_for()

    assert entry.locator("h2").inner_text() == "What is “Mills” about?"
    assert entry.locator("summary").inner_text() == "1 source: mills.md, Mills"
    assert "stands by the river" in entry.locator(".answer").inner_text()


def test_the_page_speaks_korean(browser: Any, address: str, say: Say) -> None:
    """Where the browser's language is Korean, so are the words of the page, and its lang says so."""
    say("In combs of wax.")
    with opened(browser, address, locale="ko-KR") as page:
        entry = ask_in_korean(page)
        assert page.evaluate("() => document.documentElement.lang") == "ko"
        assert entry.locator("summary").inner_text().startswith("출처 2개: ")
        assert page.get_by_role("button", name="새 대화").is_visible()
        assert page.get_by_role("button", name="묻기").is_visible()
        page.get_by_role("button", name="대화", exact=True).click()
        page.get_by_role("button", name="모두 지우기").wait_for()
        english = re.compile("[a-z]{3,}")
        for place in page.locator("[data-word], [data-name], [data-hint]").all():
            said = [place.get_attribute("aria-label"), place.get_attribute("placeholder")]
            if place.get_attribute("data-word"):
                said.append(place.text_content())
            assert not [one for one in said if one and english.search(one)]


def ask_in_korean(page: Any) -> Any:
    """Ask a question on the Korean page, and return the element of its complete answer."""
    ready(page).get_by_label("질문", exact=True).fill("Where is the honey?")
    page.keyboard.press("Enter")
    page.locator(".cost").wait_for()
    return page.locator("article")


def test_every_language_has_every_word(page: Any) -> None:
    """The tables of words have the same entries, of the same kind."""
    tables = ready(page).evaluate("""async () => {
      const { TABLES } = await import("/static/words.js");
      const kinds = (table) => Object.entries(table).map(([name, one]) => [name, typeof one]).sort();
      return Object.values(TABLES).map(kinds);
    }""")

    assert len(tables) == 2
    assert tables[0] == tables[1]


def test_a_folder_is_added(
    browser: Any, tmp_path: Path, engine: Engine, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key of the address: the page says how far it is, or what is wrong, and opens the new index."""
    monkeypatch.setattr(GistWorker, "_start", lambda worker: None)
    going, original = threading.Event(), Folders.read

    def read(folders: Folders, *, documents: int, of: int) -> None:
        original(folders, documents=documents, of=of)
        going.wait(30)

    monkeypatch.setattr(Folders, "read", read)
    (tmp_path / "root" / "notes").mkdir(parents=True)
    (tmp_path / "root" / "notes" / "bees.md").write_text(TEXTS["bees.md"], "utf-8")
    (tmp_path / "root" / "notes" / "broken.pdf").write_bytes(b"no pdf")
    key = "a-key-that-builds-0123456789"
    say("In combs of wax.")
    with (
        serving({}, engine, access={"keys": {digest(key): ALL}}, root=tmp_path / "root") as url,
        opened(browser, f"{url}/#key={key}", tolerated="status of 400") as page,
    ):
        dialog = page.get_by_role("dialog", name="Add a folder")
        dialog.wait_for()
        assert "#" not in page.url
        choices = page.locator("#folder-choices option")
        choices.first.wait_for(state="attached")
        assert choices.evaluate_all("(all) => all.map((one) => one.value)") == ["notes"]
        box = dialog.get_by_label("Path of the folder")
        box.fill("../notes")
        dialog.get_by_role("button", name="Add").click()
        dialog.get_by_text("expected the path of a folder in root, got '../notes'").wait_for()
        box.fill("notes")
        dialog.get_by_role("button", name="Add").click()
        dialog.get_by_text("Reading notes: 0 of 2 documents").wait_for()
        assert dialog.get_by_role("progressbar").is_visible()
        assert dialog.get_by_role("button", name="Add").is_disabled()
        going.set()
        dialog.get_by_text("notes can be asked now. 1 file could not be read.").wait_for()
        page.keyboard.press("Escape")

        page.locator("#facts", has_text="Gists made of 0 of 1 passage").wait_for()
        assert "In combs of wax." in answered(page, "Where is the honey?").locator(".answer").inner_text()


def test_nobody_else_is_offered_to_add_folders(browser: Any, tmp_path: Path, engine: Engine) -> None:
    """With a key of some indexes the page has no such button."""
    key = "a-key-that-reads-0123456789"
    with (
        serving(
            {"manual": build(tmp_path, engine)},
            engine,
            access={"keys": {digest(key): frozenset({"manual"})}},
            root=tmp_path,
        ) as url,
        opened(browser, f"{url}/#key={key}") as page,
    ):
        assert ready(page).locator("#show-folders").is_hidden()


def test_the_first_five_minutes(browser: Any, tmp_path: Path, engine: Engine, say: Say) -> None:
    """A person with a key: types a wrong one, takes an example, opens, asks on, reloads, copies, starts anew."""
    say("In **combs** of wax.")
    keys = {digest("alice-0123456789"): frozenset({"manual"})}
    with (
        serving({"manual": build(tmp_path, engine)}, engine, access={"keys": keys}) as url,
        opened(browser, url, tolerated="status of 401", permissions=["clipboard-read", "clipboard-write"]) as page,
    ):
        key = page.get_by_role("textbox", name="API key")
        for given in ("not-the-right-one", "alice-0123456789"):
            key.fill(given)
            page.get_by_role("button", name="Continue").click()
        page.get_by_role("button", name="What is “Bees” about?").click()
        page.locator(".cost").wait_for()
        assert "gather nectar" in page.locator(".answer").inner_text()

        second = answered(page, "Where is the honey?")
        second.get_by_role("link", name="Open source 1").click()
        page.locator("#passage mark", has_text="Honey is kept in combs of wax for winter.").wait_for()
        page.get_by_role("button", name="Close").click()
        second.locator("summary").click()
        second.locator(".sources a").nth(1).click()
        page.get_by_role("dialog", name="mills.md").wait_for()
        page.keyboard.press("Escape")
        page.get_by_label("Question", exact=True).fill("And where is it?")
        page.get_by_role("button", name="Ask").click()
        page.locator("article").nth(2).locator(".cost").wait_for()
        shown = page.locator("article h2").all_inner_texts()

        page.reload()
        page.locator("article").nth(2).locator(".cost").wait_for()
        assert page.locator("article h2").all_inner_texts() == shown
        page.get_by_role("button", name="Copy").last.click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("() => navigator.clipboard.readText()") == "In **combs** of wax."
        page.get_by_role("button", name="New chat").click()
        assert page.locator("#welcome").is_visible()
        assert page.evaluate("() => document.activeElement.id") == "question"
        page.get_by_role("button", name="Chats").click()
        page.locator("#chats .open").click()
        page.locator("article").nth(2).wait_for()


def test_a_key_is_asked_for(browser: Any, tmp_path: Path, engine: Engine, say: Say) -> None:
    """If the server requires a key, the page asks for it and keeps it for the tab."""
    say("Yes.")
    keys = {digest("alice-0123456789"): frozenset({"manual"})}
    with (
        serving({"manual": build(tmp_path, engine)}, engine, access={"keys": keys}) as url,
        opened(browser, url, tolerated="status of 401") as page,
    ):
        page.get_by_role("textbox", name="API key").fill("wrong")
        assert page.locator("header select, header button").locator("visible=true").count() == 0  # nothing known yet
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("alert").filter(has_text="That key was not accepted.").wait_for()
        page.get_by_role("textbox", name="API key").fill("alice-0123456789")
        page.get_by_role("button", name="Continue").click()

        ask(ready(page), "May I?").locator(".answer", has_text="Yes.").wait_for()
        page.reload()
        page.locator("#show-documents", has_text="2 documents").wait_for()
        assert page.locator("#key[open]").count() == 0


def test_with_the_keyboard_alone(page: Any, say: Say) -> None:
    """Tab reaches every control in page order, and each has a name for screen readers."""
    say("Yes.")
    ask(ready(page), "Can it?").locator(".cost").wait_for()

    page.get_by_role("link", name="Skip to the question").focus()
    names = []
    for place in range(14):
        page.keyboard.press("Tab")
        names.append(page.evaluate(FOCUSED))
        if place == 6:
            page.keyboard.press("Enter")  # opens the list of sources

    evidence = [name.rpartition("/")[0] for name in names[4:6]]
    assert evidence == ["#passage/manual/2"] * 2
    assert names[6] == "2 sources: bees.md, Bees · mills.md, Mills"
    assert names[7:11] == ["#passage/manual/1", "#passage/manual/2", "Copy", "Try again"]
    assert names[:4] + names[11:] == ["index", "show-documents", "show-chats", "new-chat", "question", "gist", "act"]
    unnamed = page.locator("button, input, select, textarea, a").evaluate_all(
        "(all) => all.filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).length"
    )
    assert unnamed == 0
    assert "Yes." in page.locator("#status").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (1280, "dark")])
def test_it_fits(browser: Any, address: str, say: Say, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, on a phone or a desktop, and text has enough contrast in light and dark."""
    with opened(browser, address, viewport={"width": width, "height": 700}, color_scheme=scheme) as page:
        doubtful = {"verdict": "unsure", "confidence": 0.4, "unsupported": ["words"], "searched": "c" * 100}
        sources = [carried("d" * 300), {"place": "e" * 200, "snippet": "f" * 200}]
        replied(ready(page), "a" * 200 + " and words", sources, **doubtful)
        entry = ask(page, "b" * 100)
        entry.locator(".others summary").click()
        entry.locator(".evidence a").click()
        page.locator("#passage mark").first.wait_for()
        assert page.evaluate(CONTRAST) == []
        page.keyboard.press("Escape")

        assert entry.locator(".cost").evaluate("(one) => one.scrollWidth <= one.clientWidth")
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        low = page.evaluate(CONTRAST)
        assert low == []
