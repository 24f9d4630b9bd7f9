"""Which embedder a new index has where nobody named one: by the letters of its documents.

The default embedder knows English. Where enough letters of a sample of the folder are not Latin, the multilingual one
serves, with which English questions find no less; see notebooks/LOG.md. Languages in Latin letters are not told apart.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gistrag.documents.discovery import FoundFile, listed, load
from gistrag.errors import DocumentError, ModelNotFoundError
from gistrag.model import hub
from gistrag.settings import DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER

logger = logging.getLogger("gistrag")

OTHER_LETTERS = 0.05
"""Share of letters that are not Latin from which on the multilingual embedder serves."""
SAMPLE_FILES, SAMPLE_CHARACTERS = 40, 4000
SAMPLE_BYTES = 2**20
"""Larger files are left out of the sample, since parsing them takes seconds."""


def chosen_embedder(folder: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> str:
    """Return the catalog name of the embedder for a new index of *folder*; one line says so if it is not the default.

    Raises:
        UsageError: as for `gistrag.documents.discovery.listed`.
    """
    if os.environ.get("GISTRAG_EMBEDDER"):  # which stands for the default
        return DEFAULT_EMBEDDER
    share = share_of_other_letters(_texts(folder, listed(folder, include=include, exclude=exclude)))
    if share < OTHER_LETTERS and is_here(DEFAULT_EMBEDDER):
        return DEFAULT_EMBEDDER
    told = f"{share:.0%} of the letters in a sample of {folder} are not Latin"
    if is_here(MULTILINGUAL_EMBEDDER):
        logger.info("%s: the embedder of this index is %s", told, MULTILINGUAL_EMBEDDER)
        return MULTILINGUAL_EMBEDDER
    logger.warning(
        "%s, which the embedder %s hardly knows; for another, run `gistrag models %s --install` and build again with "
        "--rebuild --embedder auto",
        told,
        DEFAULT_EMBEDDER,
        MULTILINGUAL_EMBEDDER,
    )
    return DEFAULT_EMBEDDER


def is_here(name: str) -> bool:
    """Return whether a model of the catalog is on this machine."""
    with suppress(ModelNotFoundError):
        return bool(hub.find(name, download=False))
    return False


def share_of_other_letters(texts: Iterable[str]) -> float:
    """Return the share of letters that are not Latin, 0 where there are none.

    >>> share_of_other_letters(["Seoul 서울", "Où?"])
    0.2222222222222222
    """
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum(not _is_latin(letter) for letter in letters) / len(letters) if letters else 0.0


def _is_latin(letter: str) -> bool:
    return letter < "\u0250" or "LATIN" in unicodedata.name(letter, "")


def _texts(folder: Path, found: Sequence[FoundFile]) -> Iterator[str]:
    """Yield the beginning of some documents, spread over the folder."""
    files = [file for file in found if file.size <= SAMPLE_BYTES]
    for file in files[:: max(1, len(files) // SAMPLE_FILES)][:SAMPLE_FILES]:
        with suppress(DocumentError):
            yield load(folder, file).text[:SAMPLE_CHARACTERS]
