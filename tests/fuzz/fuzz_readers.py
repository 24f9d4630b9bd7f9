"""Looks for bytes from which a reader makes neither a valid text nor one valid reason; see README.md.

    python tests/fuzz/fuzz_readers.py html /tmp/found -max_total_time=60

The first argument is a suffix of `gistrag.documents.readers.READERS`, or ``chunks`` for the step from text to chunks.
The second is a folder for inputs that reach new code; the others go to libFuzzer. Inputs that fail stay in the working
folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SEEDS = HERE.parent / "data" / "fuzz"
INSTRUMENTED = ["gistrag", "html", "_markupbase", "csv", "json"]
FOREIGN = ("pdf", "docx")  # their parsers are not ours: any exception of theirs becomes a reason in the worker


def reader(suffix: str) -> Callable[[bytes], None]:
    """Return what reads bytes as a file with this suffix and judges the outcome."""
    from support.hostile_files import judge

    from gistrag.documents.readers import read
    from gistrag.errors import DocumentError

    def once(data: bytes) -> None:
        judge(lambda: read(data, f"a.{suffix}"))

    def once_foreign(data: bytes) -> None:
        try:
            once(data)
        except (AssertionError, MemoryError, RecursionError):
            raise
        except Exception as error:
            if isinstance(error, DocumentError):
                raise

    return once_foreign if suffix in FOREIGN else once


def word_reader() -> Callable[[bytes], None]:
    """Return what puts bytes into a Word document as its main part, since a changed archive is only a broken one."""
    from support.hostile_files import SEEDS as FILES
    from support.make_files import with_part

    read = reader("docx")
    return lambda data: read(with_part(FILES["python-docx.docx"], "word/document.xml", data))


def chunker() -> Callable[[bytes], None]:
    """Return what cuts bytes as the text of a document into chunks and judges them; the first byte chooses the kind."""
    from support.hostile_files import require_whole
    from tokenizers import Tokenizer, models, pre_tokenizers

    from gistrag.documents.chunking import Chunker
    from gistrag.documents.discovery import Document

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    chunker = Chunker(tokenizer, chunk_tokens=32)

    def once(data: bytes) -> None:
        text = data[1:].decode("utf-8", "ignore").replace("\0", "").replace("\r", "\n")
        kind = "markdown" if data[:1] < b"\x80" else "text"
        if text.strip():
            document = Document(path="a", sha256="", size=0, mtime_ns=0, kind=kind, text=text)
            require_whole(document, chunker.split(document))

    return once


def main(argv: list[str]) -> None:
    """Fuzz one target until libFuzzer is told to stop or something fails."""
    import atheris

    sys.path[:0] = [str(HERE.parent)]
    target, found, *options = argv[1:]
    with atheris.instrument_imports(include=INSTRUMENTED):
        once = chunker() if target == "chunks" else word_reader() if target == "docx" else reader(target)
    Path(found).mkdir(parents=True, exist_ok=True)
    seeds = SEEDS / {"chunks": "md", "docx": "docx-xml"}.get(target, target)
    atheris.Setup([argv[0], found, *([str(seeds)] if seeds.is_dir() else []), *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
