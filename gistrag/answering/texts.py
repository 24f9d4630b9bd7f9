"""Answers from texts that somebody else found, whether or not they are in the index.

The gist key of a passage is computed from what the passage says. So a text that equals a chunk, with its heading path
on a line above, is answered from the gists of that chunk, whoever passes it. Any other text is compressed when it is
first asked about; the gist caches used last are kept in memory, up to `KEPT_BYTES`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

from gistrag.answering.answer import Options, Source, Timings, Usage
from gistrag.answering.judge import Judge
from gistrag.answering.passages import Passage, snippet
from gistrag.answering.stream import Found, Stream
from gistrag.compression.making import is_compressible
from gistrag.errors import CorruptGistError, GistNotFoundError, UsageError
from gistrag.index.store import Store, chunks_of_gist
from gistrag.kv.packed import Gists, PackedGists
from gistrag.model.runtime import AnyRuntime

if TYPE_CHECKING:
    from gistrag.model.gist_model import GistModel

KEPT_BYTES = 2**28


class GivenTexts:
    """Answers from given texts with the model and the gists of an index.

    Args:
        load_model: returns the model that makes gists.
        ask: called with the key of each gist that is wanted and still to be made.
        during: what is entered while an answer is in the making.
        judge: returns what judges the answers to a question.
    """

    def __init__(
        self,
        store: Store,
        runtime: AnyRuntime,
        load_model: Callable[[], GistModel],
        *,
        ask: Callable[[str], None] = lambda key: None,
        during: Callable[[], AbstractContextManager[None]] = nullcontext,
        judge: Callable[[str], Judge],
    ) -> None:
        self._store, self._runtime, self._load_model = store, runtime, load_model
        self._ask, self._during, self._judge = ask, during, judge
        self._kept: OrderedDict[str, PackedGists] = OrderedDict()
        self._lock = threading.Lock()

    def stream(self, question: str, texts: Sequence[str], options: Options) -> Stream:
        """Return the answer to a question from *texts*, best first, in the making.

        Raises:
            UsageError: an empty question, or an option that chooses among the chunks of an index.
        """
        if options.scope is not None or options.filters:
            raise UsageError("scope and filters choose among the chunks of the index, but the texts are given")
        filled = [text for text in texts if text.strip()]

        def find(question: str, options: Options, usage: Usage, timings: Timings) -> Found:
            with timings.measure("load_s"):
                return Found(self._passages(filled, options, usage))

        return Stream(
            self._runtime,
            question,
            options,
            find=find,
            nothing=lambda: "no texts",
            during=self._during,
            judge=self._judge,
        )

    def _passages(self, texts: Sequence[str], options: Options, usage: Usage) -> list[Passage]:
        """Return the texts as passages; takes no lock of the index, since compressing takes seconds."""
        bytes_before = self._store.gists.bytes_read
        passages = []
        for rank, text in enumerate(texts):
            wants_text = options.mode == "text" or (options.mode == "hybrid" and rank == 0)
            ids = self._runtime.encode_passage(text)
            gists = None if wants_text else self._gists(ids, usage)
            heading, begin = self._heading(text, ids)
            source = Source("", None, heading, begin, len(text), 0.0, snippet(text), 0, as_text=gists is None)
            passages.append(Passage(source, gists or ids, text[begin:]))
        usage.bytes_read = self._store.gists.bytes_read - bytes_before
        return passages

    def _heading(self, text: str, ids: Sequence[int]) -> tuple[tuple[str, ...], int]:
        """Return the heading path of the chunk that a text equals, and where the chunk begins below it."""
        for chunk in chunks_of_gist(self._store, self._store.gists.key(ids)):
            line = " > ".join(chunk.heading)
            if line and text.lstrip().startswith(f"{line}\n"):
                return chunk.heading, text.index(line) + len(line) + 1
        return (), 0

    def _gists(self, ids: Sequence[int], usage: Usage) -> Gists | None:
        """Return the gists of a passage from disk, from memory or made now; None where its text has to be read.

        Those of a chunk that are still to be made are left to whoever makes them.
        """
        key = self._store.gists.key(ids)
        with suppress(GistNotFoundError, CorruptGistError):
            return self._store.gists.load(key)
        if self._store.gists.is_pending(key):
            usage.text_pending += 1
            self._ask(key)
            return None
        settings = self._store.settings.gists
        if not is_compressible(self._runtime, ids, settings):
            return None
        with self._lock:
            cache = self._kept.pop(key, None)
            if cache is None:
                if (made := self._made(ids)) is None:
                    return None
                cache = made
                usage.gists_made += 1
            self._kept[key] = cache
            while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return cache

    def _made(self, ids: Sequence[int]) -> PackedGists | None:
        """Return gists made now; None where a number in them is not finite."""
        from gistrag.compression.compress import compress  # torch, which is loaded where a new text is compressed

        (cache,) = compress(self._load_model(), [ids], self._store.config.gists)
        return cache.packed() if cache.is_finite else None
