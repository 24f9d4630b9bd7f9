"""Ask a folder: the public surface of the library.

`GistRAG` composes what it is given: an index folder, the models it was made with, and the act of answering.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from gistrag.answering.answering import Answer, Options, Stream
from gistrag.compression.compress import making
from gistrag.documents.discovery import require_patterns
from gistrag.errors import IndexFolderError, UsageError
from gistrag.index.builder import Builder, SyncReport
from gistrag.index.embedder import Embedder, Reranker
from gistrag.index.retriever import Hit, Retriever
from gistrag.index.store import Store
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import adapter_name, find, find_adapter
from gistrag.progress import Progress, Silence, Terminal
from gistrag.settings import DEFAULT_MODEL, AdapterSettings, IndexSettings, require_same
from gistrag.storage import files


@dataclass(frozen=True)
class Engine:
    """The loaded models; indexes made with the same ones can share it."""

    model: GistModel
    embedder: Embedder
    reranker: Reranker | None = None

    @classmethod
    def load(cls, settings: IndexSettings, *, device: str | None = None, reranker: str | None = None) -> Engine:
        """Return the models an index is made with, loaded one after the other.

        Raises:
            ModelNotFoundError: with the command that brings the model.
        """
        embedder = Embedder(find(settings.embedder).path, device=device)
        embedder.embed_query("warm up")
        path = find(settings.model).path
        adapter = find_adapter(settings.adapter, path)
        model = GistModel.load(path, adapter=adapter, quantize=settings.quantize, device=device)
        return cls(model, embedder, Reranker(find(reranker).path, device=device) if reranker else None)

    def gist_fingerprint(self, settings: IndexSettings) -> dict[str, str]:
        """Return all that a gist depends on."""
        dials = {name: str(getattr(settings, name)) for name in ("placement", "tokens_per_gist", "chunk_tokens")}
        chosen = {"kv_cache_dtype": settings.kv_cache_dtype, "min_quality": settings.min_quality}
        dials |= {name: str(value) for name, value in chosen.items() if value not in ("auto", 0.0)}
        return {**self.model.fingerprint, **dials, **making(settings.placement)}


class GistRAG:
    """An index of a folder and the models that answer from it.

    >>> rag = GistRAG.from_folder("docs/")                          # doctest: +SKIP
    >>> print(rag.query("How many bytes does a slot take?"))        # doctest: +SKIP

    Attributes:
        folder: of the index; engine: the loaded models, to be shared with other indexes.
        report: what the last sync did, None where there was none.
    """

    def __init__(self, store: Store, engine: Engine) -> None:
        self.folder = store.folder
        self.engine = engine
        self.report: SyncReport | None = None
        self.model = engine.model
        self.store = store
        self._retriever = Retriever(store, engine.embedder, reranker=engine.reranker)

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        index: str | Path = "index",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rebuild: bool = False,
        verify: bool = False,
        engine: Engine | None = None,
        device: str | None = None,
        reranker: str | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> GistRAG:
        """Return a `GistRAG` over the documents of *folder*: the index is built on first use, synced afterwards.

        Args:
            folder: of documents; one that moved away keeps its index.
            index: folder of the index; made where it is missing.
            include: gitignore-style patterns; where there are any, only files they match. None: as last time.
            exclude: gitignore-style patterns of files to leave out. None: as last time.
            rebuild: make an index with other settings again, instead of refusing.
            verify: hash every gist file before it is trusted, and try again what was skipped before.
            engine: models already loaded.
            device: where to load them.
            reranker: a cross-encoder to sort hits by.
            progress: told how far the build is; by default a bar where standard error is a terminal.
            settings: fields of `IndexSettings`; what is left out is inherited from the index. A new index has
                ``adapter="auto"``: the one that is shipped for its model, and what it was trained for.

        Raises:
            UsageError: no such folder, a setting out of range, or a malformed pattern; nothing was made.
            FingerprintMismatchError: the index was made with other settings or models.
            IndexLockedError: another builder is at work.
            ResourceError: the disk is too small.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        IndexSettings(**given)  # raises before anything is made
        _require_folder(Path(folder), Path(index))
        require_patterns(include, exclude)
        with _watched(progress) as watching, Store.build(index, command="gistrag build") as store:
            wanted = _inherited(store, given, rebuild, engine)
            _require_source(store, Path(folder))
            engine = engine or Engine.load(wanted, device=device, reranker=reranker)
            _configure(store, wanted, engine, Path(folder), rebuild)
            builder = Builder(store, model=engine.model, embedder=engine.embedder, progress=watching, verify=verify)
            report = builder.sync(folder, include=include, exclude=exclude)
        rag = cls(Store.open(index), engine)
        rag.report = report
        return rag

    @classmethod
    def open(
        cls,
        index: str | Path = "index",
        *,
        engine: Engine | None = None,
        device: str | None = None,
        reranker: str | None = None,
    ) -> GistRAG:
        """Return a `GistRAG` over an index that is already there; nothing is ever written.

        Raises:
            IncompleteIndexError: no index there.
            FingerprintMismatchError: it was made by other models than those on this machine.
        """
        store = Store.open(index)
        try:
            engine = engine or Engine.load(store.settings, device=device, reranker=reranker)
            _require_engine(store, engine)
        except BaseException:
            store.close()
            raise
        return cls(store, engine)

    def close(self) -> None:
        """Close the index; the models stay as long as somebody holds them."""
        self.store.close()

    def __enter__(self) -> GistRAG:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.store.stats()
        return f"GistRAG({str(self.folder)!r}, documents={stats.documents}, chunks={stats.chunks})"

    def sync(self, *, progress: Progress | None = None) -> SyncReport:
        """Bring the index into step with its folder, by the patterns of its last build, and return what was done.

        Raises:
            FingerprintMismatchError: another builder made the index again with other settings or models.
        """
        with Store.build(self.folder, command="GistRAG.sync") as store:
            _require_engine(store, self.engine)
            builder = Builder(store, model=self.model, embedder=self.engine.embedder, progress=progress)
            self.report = builder.sync(source_folder(store))
        return self.report

    def retrieve(
        self,
        question: str,
        *,
        top_k: int = 3,
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
    ) -> list[Hit]:
        """Return the chunks that fit a question best, best first, without generating anything.

        Args:
            question: in words.
            top_k: how many chunks.
            scope: path of a document to stay in.
            filters: see `gistrag.index.store.Store.select`.

        Raises:
            UsageError: an empty question, ``top_k`` below 1, an unknown filter or document.
        """
        with self.store.snapshot():
            return self._retriever.search(question, top_k=top_k, scope=scope, filters=filters)

    def query(self, question: str, **options: Any) -> Answer:
        """Return the answer to a question; options are the fields of `gistrag.answering.answering.Options`.

        Raises:
            UsageError: an empty question, or an option out of range.
            ContextOverflowError: a question longer than the model's window.
        """
        stream = self.stream(question, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(self, question: str, **options: Any) -> Stream:
        """Return the same answer as an iterator over pieces of its text; work begins at the first ``next``."""
        return Stream(self.store, self._retriever, self.model, question=question, options=Options(**options))

    def as_retriever(self, **options: Any) -> Any:
        """Return a LlamaIndex retriever over this index; options are those of its `GistRetriever`.

        Raises:
            UsageError: its package is not installed; names the command that brings it.
        """
        return _llama_index().GistRetriever(self, **options)

    def as_query_engine(self, **options: Any) -> Any:
        """Return a LlamaIndex query engine over this index; options are those of `GistQueryEngine.from_rag`.

        Raises:
            UsageError: its package is not installed; names the command that brings it.
        """
        return _llama_index().GistQueryEngine.from_rag(self, **options)


def _llama_index() -> Any:
    """Return the package that speaks to LlamaIndex.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("llama_index.retrievers.gistrag")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "llama_index":
            raise
        raise UsageError(
            "LlamaIndex needs a package of its own: run pip install llama-index-retrievers-gistrag, or from a clone "
            "pip install -e integrations/llama-index-retrievers-gistrag"
        ) from error


def _inherited(store: Store, given: Mapping[str, Any], rebuild: bool, engine: Engine | None) -> IndexSettings:
    """Return the settings to build with: those of the index, unless it is new or made again.

    Raises:
        FingerprintMismatchError: other settings are given than the index has.
    """
    if store.is_new:
        return _fresh(given, engine)
    if rebuild:
        is_other = not {"model", "adapter"}.isdisjoint(given)
        kept = {name: value for name, value in asdict(store.settings).items() if not (is_other and name in _ADAPTED)}
        return _fresh({**kept, **given}, engine)
    named = {name: value for name, value in given.items() if (name, value) != ("adapter", "auto")}
    asked = {name: str(value) for name, value in {**asdict(store.settings), **named}.items()}
    stored = {name: str(value) for name, value in asdict(store.settings).items()}
    require_same(stored, asked, where=f"the index in {store.folder}", remedy=_REBUILD)
    return store.settings


_ADAPTED = ("adapter", "placement", "tokens_per_gist")


def _fresh(given: Mapping[str, Any], engine: Engine | None) -> IndexSettings:
    """Return the settings of a new index: what is given, and what the adapter was trained for."""
    if engine:
        folder = engine.model.adapter.folder if engine.model.adapter else None
    else:
        folder = find_adapter(given.get("adapter", "auto"), find(given.get("model", DEFAULT_MODEL)).path)
    adapter = AdapterSettings.read(folder) if folder else None
    return IndexSettings.fitting({**given, "adapter": adapter_name(folder)}, adapter)


def _configure(store: Store, settings: IndexSettings, engine: Engine, folder: Path, rebuild: bool) -> None:
    """Record what the index is made with, and where its folder is now.

    Raises:
        FingerprintMismatchError: it is neither new nor made again, and the models are others than it was made with.
    """
    room = (engine.model.window - engine.model.prefix.gists) // 2  # a chunk is read, and then read again beside itself
    if settings.chunk_tokens > room:
        raise UsageError(f"chunk_tokens must be at most {room} with this model's window, got {settings.chunk_tokens}")
    if not (store.is_new or rebuild):
        _require_engine(store, engine)
    store.configure(
        settings,
        source=os.path.relpath(folder, store.folder),
        gist_fingerprint=engine.gist_fingerprint(settings),
        embedder_fingerprint=engine.embedder.fingerprint,
    )


def _require_engine(store: Store, engine: Engine) -> None:
    """Return if the models are those the index was made with.

    Raises:
        FingerprintMismatchError: names what differs.
    """
    where = f"the index in {store.folder}"
    require_same(store.gist_fingerprint, engine.gist_fingerprint(store.settings), where=where, remedy=_REBUILD)
    require_same(store.embedder_fingerprint, engine.embedder.fingerprint, where=where, remedy=_REBUILD)


def _watched(progress: Progress | None) -> AbstractContextManager[Progress]:
    """Return who is told how far a build is: a bar of our own goes away with the build, another's is left to them."""
    if progress:
        return nullcontext(progress)
    return Terminal() if sys.stderr.isatty() else nullcontext(Silence())


def _require_folder(folder: Path, index: Path) -> None:
    """Return if there are documents to index, and the index is not to lie right among them.

    Raises:
        UsageError: says which of the two.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UsageError(f"expected a folder of documents at {folder}, found {found}; check the path")
    with files.explained("look at", index):
        is_same = index.exists() and index.samefile(folder)
    if is_same:
        raise UsageError(f"expected another folder for the index than {folder}, found the same; name one with --index")


def _require_source(store: Store, folder: Path) -> None:
    """Return if the index is of *folder*, or of one that has moved away.

    Raises:
        IndexFolderError: it is of another folder, whose documents would all be removed.
    """
    if store.is_new:
        return
    recorded = source_folder(store)
    if recorded.exists() and folder.exists() and not recorded.samefile(folder):
        raise IndexFolderError(
            f"{store.folder} is the index of {recorded}, not of {folder}; give --index another folder, or remove "
            f"{store.folder} first"
        )


def source_folder(store: Store) -> Path:
    """Return the folder of documents an index is of; recorded relative to the index, so that both can move."""
    return Path(os.path.normpath(store.folder / store.source))


_REBUILD = "run `gistrag build --rebuild` to make it again, or name another --index"
