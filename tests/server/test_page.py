"""The page in a real browser: asking, stopping, what goes wrong, and that it talks to nobody else.

Needs playwright (from the extra `dev`) and a Chromium, looked for under its usual names or at GISTRAG_BROWSER.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.live_server import build, serving

from gistrag.answering import stream as answer_stream
from gistrag.engine import Engine
from gistrag.model.gist_model import GistModel
from gistrag.server.auth import digest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
BROWSER = os.environ.get("GISTRAG_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser; apt-get install chromium, or set GISTRAG_BROWSER")

WAIT_MS = 60_000
EVIL = (
    '<img src="http://evil.example/a.png"> ![b](http://evil.example/b.png) [c](http://evil.example) <script>x</script>'
)

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
  return [...document.querySelectorAll("h1, h2, p, span, b, small, button, select")]
    .filter((one) => one.checkVisibility() && one.textContent.trim() && !one.children.length && contrast(one) < 4.5)
    .map((one) => `${one.tagName} ${one.className} ${one.textContent}`);
}"""
"""What has less than 4.5 times the light of its ground, or the other way round (WCAG AA)."""

Say = Callable[..., None]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[str]:
    """The address of a server of three indexes: two documents, none, and one that means harm."""
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
    """The page, open; in the end it must have asked nobody else and complained of nothing."""
    with opened(browser, address) as shown:
        yield shown


@contextmanager
def opened(browser: Any, address: str, *, tolerated: str = "never", **options: Any) -> Iterator[Any]:
    """Give the page at an address; a request to others, a script error or a complaint on the console is a failure.

    Args:
        tolerated: part of a complaint that belongs to the test.
        options: of the browser's context, such as its width.
    """
    wrong: list[str] = []

    def hear(message: Any) -> None:
        if message.type in ("error", "warning") and tolerated not in message.text:
            wrong.append(message.text)

    def see(request: Any) -> None:
        if not request.url.startswith((address, "data:")):
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
    assert [] == wrong


@pytest.fixture
def say(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Let the model say a text, a letter at a time."""

    def be_told(text: str, *, pause_s: float = 0.0) -> None:
        def letters(*given: object, **options: object) -> Iterator[int]:
            for token in model.encode(text):
                time.sleep(pause_s)
                yield token

        monkeypatch.setattr(answer_stream, "generate", letters)

    return be_told


def ask(page: Any, question: str) -> Any:
    """Ask as people do, and return the entry of the answer."""
    page.get_by_label("Question", exact=True).fill(question)
    page.keyboard.press("Enter")
    return page.locator("article").last


def ready(page: Any) -> Any:
    """Return the page when it has loaded the index."""
    page.locator("#facts:not(:empty)").wait_for()
    return page


def test_ask(page: Any, say: Say) -> None:
    """An answer comes with sources, what it took, and the passages behind it a click away."""
    say("In combs of wax.")

    entry = ask(ready(page), "Where is the honey?")
    entry.locator(".sources").wait_for()

    assert "Where is the honey?" == entry.locator("h2").inner_text()
    assert "In combs of wax." == entry.locator(".answer").inner_text()
    assert "false" == entry.get_attribute("aria-busy")
    assert ["bees.md, Bees", "mills.md, Mills"] == entry.locator(".place").all_inner_texts()
    assert ["gists", "gists"] == entry.locator(".how").all_inner_texts()
    assert "of text" in entry.locator(".cost").inner_text()
    assert "to the first word" in entry.locator(".cost").inner_text()

    entry.locator(".sources a").first.click()
    passage = page.get_by_role("dialog", name="bees.md")
    passage.wait_for()
    assert "combs of wax for winter" in passage.inner_text()
    assert "#passage/manual/" in page.url
    page.keyboard.press("Escape")
    passage.wait_for(state="hidden")
    page.wait_for_url(lambda url: "#" not in url)  # the page forbids the eval of other ways to wait


def test_modes_and_documents(page: Any, say: Say) -> None:
    """How passages are read, and which document is asked, is chosen on the page and holds for the question."""
    say("It grinds.")
    ready(page).get_by_role("radio", name="Text").check()
    page.get_by_role("button", name="2 documents").click()
    page.get_by_label("Filter documents").fill("mill")
    page.get_by_role("button", name="mills.md").click()

    entry = ask(page, "What does it do?")
    entry.locator(".sources").wait_for()

    assert (["mills.md, Mills"], ["text"]) == (
        entry.locator(".place").all_inner_texts(),
        entry.locator(".how").all_inner_texts(),
    )
    assert "only in mills.md" in entry.locator("h2").inner_text()
    assert "read as text" in entry.locator(".cost").inner_text()
    page.get_by_role("button", name="Searching only in mills.md").click()
    assert page.locator("#scope").is_hidden()


def test_stop(page: Any, say: Say) -> None:
    """An answer is seen as it comes, and can be stopped with the button or with Escape."""
    say("on and on and on " * 20, pause_s=0.02)
    ready(page)

    for act in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        entry = ask(page, "How long?")
        entry.locator(".answer", has_text="on").wait_for()
        assert "true" == entry.get_attribute("aria-busy")
        act()
        entry.get_by_text("Stopped.").wait_for()
        assert 0 < len(entry.locator(".answer").inner_text()) < 300

    say("Again.")
    ask(page, "And now?").locator(".answer", has_text="Again.").wait_for()


def test_what_goes_wrong_is_said(browser: Any, address: str, say: Say) -> None:
    """An error is told in the place of the answer, and the next question is answered."""
    say("Fine.")
    with opened(browser, address, tolerated="status of 400") as page:
        alarm = ask(ready(page), "why " * 500).get_by_role("alert")
        alarm.wait_for()

        assert "the model's context window has 1024" in alarm.inner_text()
        ask(page, "Why?").locator(".answer", has_text="Fine.").wait_for()


def test_an_empty_index_says_what_to_do(page: Any) -> None:
    """Where there are no documents, the page says so, and so does an answer."""
    ready(page).get_by_label("Index").select_option("empty")
    page.locator("#facts", has_text="This index has no documents yet").wait_for()

    ask(page, "Anything?").locator(".answer", has_text="There are no documents").wait_for()
    assert 0 == page.locator(".sources").count()


def test_an_index_that_does_not_open_says_so(browser: Any, address: str, say: Say) -> None:
    """After a question too; what was asked in the index before is gone."""
    say("Fine.")
    with opened(browser, address, tolerated="status of 429") as page:
        ask(ready(page), "Why?").locator(".answer", has_text="Fine.").wait_for()
        page.route(
            "**/v1/documents?model=evil", lambda one: one.fulfill(status=429, json={"error": {"message": "full"}})
        )
        page.get_by_label("Index").select_option("evil")
        page.get_by_role("alert").filter(has_text="full").wait_for()
        assert 0 == page.locator("article").count()


def test_an_answer_stays_while_the_index_opens(page: Any, say: Say) -> None:
    """A question may be asked before the list of documents has come."""
    say("Fine.")
    held: list[Any] = []
    page.route("**/v1/documents?model=evil", lambda one: held.append(one))
    ready(page).get_by_label("Index").select_option("evil")
    entry = ask(page, "Why?")
    entry.locator(".answer", has_text="Fine.").wait_for()
    held[0].continue_()
    page.locator("#show-documents", has_text="1 document").wait_for()

    assert "Fine." == entry.locator(".answer").inner_text()


def test_nothing_that_is_said_or_read_becomes_markup(page: Any, say: Say) -> None:
    """Images, links and scripts in answers and documents stay the text they are; no other host is asked."""
    say(EVIL)
    ready(page).get_by_label("Index").select_option("evil")
    page.locator("#facts", has_text="1 document in").wait_for()

    entry = ask(page, EVIL)
    entry.locator(".sources a").click()
    page.get_by_role("dialog").wait_for()

    assert EVIL == entry.locator(".answer").inner_text() == entry.locator("h2").inner_text()
    assert EVIL == page.locator("#passage p").inner_text()
    assert 0 == page.locator("main img, dialog img, main script, dialog script").count()
    links = page.locator("main a").evaluate_all("(links) => links.map((one) => one.getAttribute('href'))")
    assert all(link.startswith("#passage/") for link in links)


def test_a_key_is_asked_for(browser: Any, tmp_path: Path, engine: Engine, say: Say) -> None:
    """Where the server wants a key, the page asks for it and keeps it for the tab."""
    say("Yes.")
    keys = {digest("alice-0123456789"): frozenset({"manual"})}
    with (
        serving({"manual": build(tmp_path, engine)}, engine, access={"keys": keys}) as url,
        opened(browser, url, tolerated="status of 401") as page,
    ):
        page.get_by_role("textbox", name="API key").fill("wrong")
        page.get_by_role("button", name="Continue").click()
        page.get_by_role("alert").filter(has_text="That key was not accepted.").wait_for()
        page.get_by_role("textbox", name="API key").fill("alice-0123456789")
        page.get_by_role("button", name="Continue").click()

        ask(ready(page), "May I?").locator(".answer", has_text="Yes.").wait_for()
        page.reload()
        ready(page)
        assert 0 == page.locator("#key[open]").count()


def test_with_the_keyboard_alone(page: Any, say: Say) -> None:
    """Everything is in reach of Tab, in the order it stands on the page, and has a name to be read out."""
    say("Yes.")
    ask(ready(page), "Can it?").locator(".sources").wait_for()

    page.get_by_role("link", name="Skip to the question").focus()
    names = []
    for _ in range(7):
        page.keyboard.press("Tab")
        names.append(page.evaluate("() => [document.activeElement].map((one) => one.id || one.value || one.hash)[0]"))

    passages = ["#passage/manual/1", "#passage/manual/2"]
    assert ["index", "show-documents", *passages, "question", "gist", "act"] == names
    unnamed = page.locator("button, input, select, textarea, a").evaluate_all(
        "(all) => all.filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length)).length"
    )
    assert 0 == unnamed
    assert "Yes." in page.locator("[role=status]").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (1280, "dark")])
def test_it_fits(browser: Any, address: str, say: Say, width: int, scheme: str) -> None:
    """Nothing is wider than the screen, on a phone or a desk, and text stands out from its ground in light and dark."""
    say("a" * 200 + " and words")
    with opened(browser, address, viewport={"width": width, "height": 700}, color_scheme=scheme) as page:
        ask(ready(page), "b" * 100).locator(".sources").wait_for()

        assert width == page.evaluate("() => document.documentElement.scrollWidth")
        low = page.evaluate(CONTRAST)
        assert [] == low
