"""The CPU runtime: answers with 8-bit weights, and without torch in the process.

A model and its adapter are converted once (`gistrag.model.cpu_conversion`) to two graphs over the same buffers of keys
and values: one with the adapter, which reads questions and answers, and one without, which reads text. onnxruntime runs
them. A memory is a buffer with room behind it (`gistrag.model.cpu_memory`): gists are dequantized and rotated into
their places, and every token that is read adds its keys and values behind those of each head. A layer with a window is
told with every step which slots are near enough.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from gistrag.errors import UnsupportedModelError
from gistrag.kv import gist_file
from gistrag.kv.packed import Array, Floats, Gists, Integers, PackedGists, Rows
from gistrag.model.cpu_memory import Buffer, CpuMemory
from gistrag.model.prompt import Prompt
from gistrag.model.runtime import TEMPERATURE_MIN, Runtime, Trace, require_single
from gistrag.settings import Layout

ROOM = 512
"""Slots behind a new memory, for what is read next; a buffer that is full is copied into a larger one."""
FACTS, ANSWERS, TEXT, PREFIX, TOKENIZER = "runtime.json", "answers.onnx", "text.onnx", "prefix", "tokenizer.json"
"""Files of a converted model."""
READING, END = -1, -2
"""In place of a token: a piece of the prompt is read; there is no token any more."""
FAR = np.float32(-1e30)
"""What is added to the score of a slot outside of a layer's window."""


class CpuRuntime(Runtime[CpuMemory]):
    """A converted model.

    Attributes:
        folder: of the conversion, see `gistrag.model.cpu_conversion`.

    Raises:
        UnsupportedModelError: onnxruntime refuses the graph.
    """

    name = "cpu"

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        super().__init__(Tokenizer.from_file(str(folder / TOKENIZER)), Prompt(**facts["prompt"]))
        self.folder = folder
        self.window = int(facts["window"])
        self.stop_ids, self.end_id = frozenset(facts["stop_ids"]), int(facts["end_id"])
        self.line_ends = frozenset(facts["line_ends"])
        self.layers, self.kv_heads, self.head_dim = (int(facts[name]) for name in ("layers", "kv_heads", "head_dim"))
        self._fingerprint: dict[str, str] = facts["fingerprint"]
        self._inv_freq, self._scaling = np.array(facts["inv_freq"], np.float32), np.float32(facts["scaling"])
        self._kinds, kinds = np.unique(np.atleast_2d(self._inv_freq), axis=0, return_inverse=True)
        self._kind_of_layer = kinds.ravel()  # where layers turn their keys by angles of their own
        prefix = (folder / PREFIX).read_bytes()
        self._prefix = gist_file.decode(prefix, folder / PREFIX, key=PREFIX, fingerprint="")
        self.local_window = facts.get("local_window")
        self._local_layers: list[int] = facts.get("local_layers", [])
        self._spare: list[Floats] = []
        self._traced = frozenset(facts["traced"])  # layers whose attention the graph of the answers gives anyway
        self._graphs: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._graph(ANSWERS)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a gist depends on, as the torch runtime of the same model and adapter has it."""
        return dict(self._fingerprint)

    @property
    def device_name(self) -> str:
        """Always the CPU."""
        return "cpu"

    @property
    def context_bytes_per_slot(self) -> int:
        """Bytes that the float32 keys and values of one slot take."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 4

    @property
    def prefix_slots(self) -> int:
        """Slots of the shared prefix."""
        return self._prefix.gists

    def concatenate(self, caches: Sequence[Gists], *, layout: Layout = "spread", start: int = 0) -> CpuMemory:
        """Return the shared prefix and gist caches side by side, dequantized and rotated in float32."""
        packed = [self._prefix, *map(_packed, caches)]
        counts = np.sum([one.counts for one in packed], axis=0)
        shape = (2, *counts.shape, int(counts.max()) + ROOM, self.head_dim)
        buffer = Buffer(shape, self._spare, has_places=self.local_window is not None)
        memory = CpuMemory(buffer, np.zeros(counts.shape, np.int32), start)
        for one in packed:
            self._place(memory, one, layout)
        return memory

    def _place(self, memory: CpuMemory, gists: PackedGists, layout: Layout) -> None:
        """Put the rows of one cache behind what the memory holds."""
        rows = gists.rows()
        begins = np.cumsum(rows.counts) - rows.counts.ravel()  # the first row of each head
        inside = np.arange(len(rows.positions)) - np.repeat(begins, rows.counts.ravel())
        firsts = np.arange(memory.ends.size) * memory.keys.shape[2] + memory.ends.ravel()
        slots = np.repeat(firsts, rows.counts.ravel()) + inside
        positions = memory.next_position + placed(rows, gists, layout)
        memory.keys.reshape(-1, self.head_dim)[slots] = self._rotated(rows, positions)
        memory.values.reshape(-1, self.head_dim)[slots] = rows.values
        if memory.buffer.places is not None:
            memory.buffer.places.reshape(-1)[slots] = positions
        memory.ends += rows.counts.astype(np.int32)
        memory.next_position += gists.span(layout)

    def _rotated(self, rows: Rows, positions: Integers) -> Floats:
        """Return the keys of rows, ``(kept, head_dim)``, turned to *positions*, ``(kept,)``."""
        if self._inv_freq.ndim == 1:
            return turned(rows.keys, positions, self._inv_freq, self._scaling)
        of_row = np.repeat(self._kind_of_layer, rows.counts.sum(axis=1))
        found = np.empty_like(rows.keys)
        for kind, inv_freq in enumerate(self._kinds):
            if (here := of_row == kind).any():
                found[here] = turned(rows.keys[here], positions[here], inv_freq, self._scaling)
        return found

    def read_text_steps(self, memory: CpuMemory, ids: Sequence[int]) -> Generator[None, None, CpuMemory]:
        """Return a memory with *ids* read as text behind it, by the graph without the adapter."""
        memory = memory.with_room(len(ids) + ROOM, self._spare)
        memory.is_taken = True  # for good: the text now stands where its room was
        reading = self._reading(TEXT, memory)
        for piece in self.pieces(ids):
            reading.feed(piece)
            yield
        return replace(memory, ends=reading.ends, next_position=reading.position, is_taken=False)

    def decode_steps(
        self,
        memories: Sequence[CpuMemory],
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        trace: Trace | None = None,
    ) -> Iterator[dict[int, int]]:
        """Yield the next token of every unfinished row; rows take turns, and read their prompts in pieces."""
        require_single(memories, trace)
        randomness = np.random.default_rng(seed % 2**64)
        rows = {
            row: self._tokens(memory, prompt, max_new_tokens, temperature, randomness, trace)
            for row, (memory, prompt) in enumerate(zip(memories, prompts, strict=True))
        }
        try:
            while rows:
                found = {row: next(tokens, END) for row, tokens in rows.items()}
                rows = {row: rows[row] for row, token in found.items() if token != END}
                if rows:
                    yield {row: token for row, token in found.items() if token not in (READING, END)}
        finally:
            for tokens in rows.values():
                tokens.close()

    def _tokens(
        self,
        memory: CpuMemory,
        prompt: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        randomness: np.random.Generator,
        trace: Trace | None,
    ) -> Generator[int]:
        """Yield the tokens of one answer, `READING` after each piece of the prompt but the last."""
        memory = memory.with_room(len(prompt) + max_new_tokens, self._spare)
        memory.is_taken = True
        try:
            reading = self._reading(ANSWERS, memory, trace.layers if trace else ())
            *pieces, ids = self.pieces(prompt)
            for piece in pieces:
                reading.feed(piece)
                yield READING
            for step in range(max_new_tokens):
                logits = reading.feed(ids)
                if step == 0 and self.line_ends:
                    logits[sorted(self.line_ends)] = -np.inf
                token = pick(logits, temperature, randomness)
                if trace:
                    seen = {layer: _last(reading.attention(layer), memory.ends[layer]) for layer in trace.layers}
                    trace.record(logits, token, seen)
                if token in self.stop_ids:
                    return
                yield token
                ids = [token]
        finally:
            memory.is_taken = False

    def attention(self, memory: CpuMemory, ids: Sequence[int], *, layers: Sequence[int]) -> dict[int, list[Floats]]:
        """Return how much each of *ids* attends to the slots of *memory*, see `Runtime.attention`."""
        reading = self._reading(ANSWERS, memory.with_room(len(ids), self._spare), layers)
        reading.feed(ids)
        found = {}
        for layer in layers:
            weights = reading.attention(layer)  # (kv_heads, heads / kv_heads, n, slots)
            found[layer] = [of_head[:, :end] for group, end in zip(weights, memory.ends[layer], strict=True)
                            for of_head in group]  # fmt: skip
        return found

    def _reading(self, name: str, memory: CpuMemory, layers: Sequence[int] = ()) -> _Reading:
        """Return a reading behind a memory by one of the graphs, which gives the attention of *layers* too."""
        return _Reading(self._graph(name, layers), memory, window=self.local_window, local=self._local_layers)

    def _graph(self, name: str, layers: Sequence[int] = ()) -> Any:
        """Return a session of one of the graphs, loaded at its first use; it gives the attention of *layers* too."""
        if not (self.folder / name).exists():
            name = ANSWERS  # without an adapter text is read by the same weights
        attention = () if self._traced.issuperset(layers) else tuple(sorted(set(layers)))
        key = (name, attention)
        if key not in self._graphs:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            path = self.folder / name
            source: str | bytes = str(path)
            if attention:
                from gistrag.model.cpu_graph import with_attention

                source = with_attention(path.read_bytes(), attention)
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(self.folder)
                )
            try:
                session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime has no exception of its own
                raise UnsupportedModelError(f"onnxruntime refuses the model: {str(error).splitlines()[0]}") from error
            self._graphs[key] = session
        return self._graphs[key]


class _Reading:
    """Tokens being read behind a memory, into its room.

    Inputs and outputs are bound once; a step changes the numbers in them.

    Args:
        window: of the layers *local*, in positions.
    """

    def __init__(self, session: Any, memory: CpuMemory, *, window: int | None, local: Sequence[int]) -> None:
        layers, kv_heads = memory.ends.shape
        self._window, self._local = window, list(local)
        self._session, self._memory = session, memory
        self.ends, self.position = memory.ends.copy(), memory.next_position
        self._lasts = memory.ends.copy()  # slots - 1 of each head, as the graph wants them
        self._slots, self._counts = np.zeros((), np.int32), np.zeros(kv_heads, np.int32)
        self._binding = session.io_binding()
        self._held: list[Any] = []
        shapes = {output.name: output.shape for output in session.get_outputs()}
        for layer in range(layers):
            for kind, buffer in (("keys", memory.keys), ("values", memory.values)):
                value = self._value(buffer[layer][:, None])
                self._binding.bind_ortvalue_input(f"{kind}{layer}", value)
                self._binding.bind_ortvalue_output(f"new_{kind}{layer}", value)
            self._binding.bind_ortvalue_input(f"ends{layer}", self._value(self._lasts[layer]))
        self._binding.bind_ortvalue_input("slots", self._value(self._slots))
        self._binding.bind_ortvalue_input("counts", self._value(self._counts))
        self._logits = np.empty(shapes.get("logits", (0, 0, 0)), np.float32)
        if "logits" in shapes:
            self._binding.bind_ortvalue_output("logits", self._value(self._logits))
        self._observed = [name for name in shapes if name.startswith("attention")]
        self._token: tuple[Array, Array] | None = None

    def _value(self, array: Array) -> Any:
        """Return a value of onnxruntime that is the memory of *array*."""
        self._held.append(array)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def feed(self, ids: Sequence[int]) -> Floats:
        """Read tokens and return the logits behind the last one, ``(vocabulary,)``; empty of a graph without a head."""
        count = len(ids)
        self.ends += count
        self._lasts[...] = self.ends - 1
        self._slots[...] = self.ends.max()
        self._counts[...] = count
        if count == 1 and self._token:
            self._token[0][...], self._token[1][...] = ids[0], self.position
        else:
            positions = self.position + np.arange(count)
            bound = (np.array([ids], np.int64), np.tile(positions, (len(self._counts), 1)))
            for name, array in zip(("ids", "positions"), bound, strict=True):
                self._binding.bind_ortvalue_input(name, self._value(array))
            self._token = bound if count == 1 else None
        if self._window is not None:
            self._bind_near(count)
        for name in self._observed:  # anew, since their size changes with every step
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        self.position += count
        return self._logits.reshape(-1)

    def _bind_near(self, count: int) -> None:
        """Tell layers with a window which slots are near enough to each of the *count* tokens being read."""
        places = self._memory.buffer.places
        assert places is not None
        assert self._window is not None
        asked = np.arange(self.position, self.position + count, dtype=np.int32)
        layers, heads = np.arange(len(self.ends))[:, None, None], np.arange(len(self._counts))[:, None]
        slots = (self.ends - count)[..., None] + np.arange(count)  # where their keys and values go
        places[layers, heads, slots] = asked
        seen = places[self._local][:, :, None, : int(self._slots)]  # (local layers, kv_heads, 1, slots)
        near = np.where(seen > asked[:, None] - self._window, np.float32(0), FAR)
        self._near = [onnxruntime.OrtValue.ortvalue_from_numpy(of_layer[:, None]) for of_layer in near]
        for number, value in zip(self._local, self._near, strict=True):
            self._binding.bind_ortvalue_input(f"near{number}", value)
        self._near_bytes = near  # the values above are its memory

    def attention(self, layer: int) -> Floats:
        """Return the attention of a layer in the last step, ``(kv_heads, heads / kv_heads, n, slots)``."""
        outputs = self._binding.get_outputs()[-len(self._observed) :]
        found: Floats = outputs[self._observed.index(f"attention{layer}")].numpy()
        return found


def _last(weights: Floats, ends: npt.NDArray[np.int32]) -> list[Floats]:
    """Return what the last token read attends to in the memory, ``(slots,)`` of each head.

    Args:
        weights: ``(kv_heads, heads / kv_heads, n, slots)``.
        ends: filled slots of the memory, ``(kv_heads,)``.
    """
    return [of_head[-1, :end].copy() for group, end in zip(weights, ends, strict=True) for of_head in group]


def turned(keys: Floats, positions: Integers, inv_freq: Floats, scaling: np.float32) -> Floats:
    """Return *keys*, ``(kept, head_dim)``, turned to *positions*, ``(kept,)``."""
    first = int(positions.min())
    angles = np.arange(first, int(positions.max()) + 1, dtype=np.float32)[:, None] * inv_freq
    cos = (np.cos(angles) * scaling)[positions - first]
    sin = (np.sin(angles) * scaling)[positions - first]
    low, high = np.split(keys, 2, axis=1)
    found = np.empty_like(keys)
    half = low.shape[1]
    found[:, :half] = low * cos - high * sin
    found[:, half:] = high * cos + low * sin
    return found


def placed(rows: Rows, gists: PackedGists, layout: Layout) -> Integers:
    """Return the position of each row in the span of its chunk, see `gistrag.kv.cache.relocate`."""
    if layout == "spread":
        return rows.positions
    if gists.is_ragged:
        return rows.positions * gists.gists // gists.source_tokens
    return np.tile(np.arange(gists.gists), rows.counts.size)


def _packed(gists: Gists) -> PackedGists:
    """Return gists as rows can be made of them; a gist cache of torch is packed first."""
    if isinstance(gists, PackedGists):
        return gists
    found: PackedGists = gists.packed("auto")  # type: ignore[attr-defined]  # a GistCache, which needs torch
    return found


def pick(logits: Floats, temperature: float, randomness: np.random.Generator) -> int:
    """Return the next token: the most likely one below `TEMPERATURE_MIN`, else one drawn.

    >>> pick(np.array([0.0, 2.0, 1.0], np.float32), 0.0, np.random.default_rng(0))
    1
    """
    if temperature < TEMPERATURE_MIN:
        return int(logits.argmax())
    with np.errstate(over="ignore", under="ignore"):
        likely = np.exp((logits.astype(np.float64) - logits.max()) / temperature).cumsum()
    return int(np.searchsorted(likely, randomness.random() * likely[-1], side="right"))
