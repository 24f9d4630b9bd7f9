"""Texts to vectors, with the real default embedder."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from gistrag.errors import UnsupportedModelError
from gistrag.index.embedder import OVERLAP_TOKENS, Embedder
from gistrag.index.encoders import Kind, SentenceEncoder, graph_encoder
from gistrag.model.hub import find
from gistrag.settings import DEFAULT_EMBEDDER

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(find(DEFAULT_EMBEDDER).path)


def test_vectors_are_normalised(embedder: Embedder) -> None:
    """Question and document vectors have length 1, so that the inner product is the cosine."""
    question, (document,) = (
        embedder.embed_query("Where are the mills?"),
        embedder.embed_documents(["Mills on a river."]),
    )

    assert question.shape == (384,)
    assert document.shape == (1, 384)
    np.testing.assert_allclose([np.linalg.norm(question), np.linalg.norm(document[0])], 1, atol=1e-5)


def test_meaning_is_near(embedder: Embedder) -> None:
    """A question is nearer to its answer than to something else."""
    question = embedder.embed_query("How tall is the tower?")
    answer, other = embedder.embed_documents(["The spire rises 93 metres above the square.", "Soup is eaten hot."])

    assert question @ answer[0] > question @ other[0]


def test_a_long_text_gets_a_vector_for_each_window(embedder: Embedder) -> None:
    """What stands after the model's window is still found: the end of a long text has a vector of its own."""
    text = "Filler words about nothing at all. " * 120 + "The password of the lighthouse is heron."

    (vectors,) = embedder.embed_documents([text])

    scores = vectors @ embedder.embed_query("What is the password of the lighthouse?")
    assert len(vectors) > 3
    assert int(scores.argmax()) == len(vectors) - 1


def test_windows_cover_the_text_and_fit_the_model(embedder: Embedder) -> None:
    """Each window fits, neighbours overlap, first and last meet the ends of the text."""
    text = " ".join(f"word{i}" for i in range(900))

    windows = embedder.windows(text)

    assert text.startswith(windows[0])
    assert text.endswith(windows[-1])
    assert all(
        len(embedder._encoder.tokenizer.encode(window, add_special_tokens=False)) <= embedder.window
        for window in windows
    )
    starts = [text.index(window) for window in windows]
    assert all(start < before + len(window) for before, window, start in zip(starts, windows, starts[1:], strict=False))
    assert OVERLAP_TOKENS > 0


def test_no_text_gives_no_vectors(embedder: Embedder) -> None:
    """An empty list is an empty list."""
    assert embedder.embed_documents([]) == []


TEXTS = ("Where?", "Mills on a river, and a tower of 93 metres.", "한국어 문장도 읽는다.", "", "word " * 400)


@pytest.mark.parametrize("kind", ["query", "document"])
def test_the_graph_gives_the_vectors_of_the_model(embedder: Embedder, kind: Kind) -> None:
    """For short and long texts, alone and in a batch, the graph is the model to four digits."""
    own = SentenceEncoder(embedder.folder, device="cpu").encode(TEXTS, kind)

    graph = graph_encoder(embedder.folder)
    together = graph.encode(TEXTS, kind)
    alone = np.concatenate([graph.encode([text], kind) for text in TEXTS])

    np.testing.assert_allclose(together, own, atol=1e-4)
    np.testing.assert_allclose(alone, own, atol=1e-4)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UnsupportedModelError("other vectors")])
def test_what_cannot_be_exported_runs_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """One line says so, and the vectors are the same."""

    def failing(_: Path) -> None:
        raise error

    folder = find(DEFAULT_EMBEDDER).path
    expected = Embedder(folder).embed_query("Where?")
    monkeypatch.setattr("gistrag.index.embedder.graph_encoder", failing)

    with caplog.at_level(logging.WARNING):
        found = Embedder(folder).embed_query("Where?")

    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [record.message for record in caplog.records if record.name == "gistrag"] == [
        f"embedding with torch, which takes seconds to load: {error}"
    ]


def test_a_long_text_has_one_vector(embedder: Embedder) -> None:
    """A short text has its own vector, as a query or as a document; a longer one the mean of its windows."""
    long = " ".join(["The mill grinds rye."] * 200)

    vectors = embedder.embed(["Where?", long], "document")

    windows = np.mean(embedder.embed_documents([long])[0], axis=0)
    np.testing.assert_allclose(vectors[0], embedder.embed_documents(["Where?"])[0][0], atol=1e-4)
    np.testing.assert_allclose(vectors[1], windows / np.linalg.norm(windows), atol=1e-4)
    np.testing.assert_allclose(embedder.embed(["Where?"], "query")[0], embedder.embed_query("Where?"), atol=1e-4)
    assert embedder.count_tokens("Where?") == 2
