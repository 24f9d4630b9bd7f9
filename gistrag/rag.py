"""`GistRAG`: an index of a folder, and the models that answer from it.

A question becomes an answer in four steps::

    hits      chunks nearest in meaning and words             gistrag.index.retriever
    passages  their gist caches, or their text                gistrag.answering.passages
    memory    all passages side by side                       gistrag.answering.assemble
    tokens    the model reads the question behind the memory  gistrag.model.generation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from gistrag.answering.answer import Answer, Options
from gistrag.answering.finding import Finder
from gistrag.answering.stream import Stream
from gistrag.answering.texts import GivenTexts
from gistrag.configure import (
    configure,
    folder_of,
    inherited,
    located,
    placed,
    require_engine,
    require_folder,
    require_gists,
    require_models,
    require_source,
    source_folder,
    with_embedder,
    with_file,
)
from gistrag.contents import Contents
from gistrag.documents.patterns import require_patterns
from gistrag.engine import Engine
from gistrag.frameworks import LlamaIndex
from gistrag.index import document_file, importing
from gistrag.index.builder import Builder, SyncReport
from gistrag.index.gist_maker import compress_texts, make_gists
from gistrag.index.gist_worker import GistWorker, When
from gistrag.index.retriever import Retriever
from gistrag.index.store import Store
from gistrag.progress import GistProgress, Progress, shown_or
from gistrag.settings import IndexSettings, KvCacheDtype, Mode, Placement, RuntimeName

if TYPE_CHECKING:
    from gistrag.model.gist_model import GistModel

OTHER_INDEX = "name another index folder"


class GistRAG(Contents, LlamaIndex):
    """An index of a folder and the models that answer from it.

    >>> rag = GistRAG.from_folder("docs/")                          # doctest: +SKIP
    >>> print(rag.query("How many bytes does a slot take?"))        # doctest: +SKIP

    Attributes:
        folder: of the index; engine: the loaded models, which other indexes can share.
        report: what the last sync did, None where there was none.
    """

    def __init__(self, store: Store, engine: Engine) -> None:
        retriever = Retriever(store, engine.embedder, reranker=engine.reranker)
        finder = Finder(store, retriever, engine.runtime, ask=lambda ids: self._worker.ask(ids))
        super().__init__(store, retriever, finder)
        self.engine = engine
        self.report: SyncReport | None = None
        self.runtime = engine.runtime
        self._worker = GistWorker(store)
        ask, during = (lambda key: self._worker.ask_for(key)), (lambda: self._worker.paused())
        self._given = GivenTexts(
            store, engine.runtime, lambda: engine.model, ask=ask, during=during, judge=engine.judge
        )

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
        delete: bool = True,
        prune: bool = False,
        gists: When = "background",
        engine: Engine | None = None,
        device: str | None = None,
        runtime: RuntimeName = "auto",
        reranker: str | None = None,
        progress: Progress | None = None,
        model: str | None = None,
        embedder: str | None = None,
        adapter: str | None = None,
        placement: Placement | None = None,
        tokens_per_gist: int | None = None,
        chunk_tokens: int | None = None,
        quantize: Literal["none", "nf4"] | None = None,
        kv_cache_dtype: KvCacheDtype | None = None,
    ) -> Self:
        """Return a `GistRAG` over the documents of *folder*: the index is built on first use, synced afterwards.

        It answers once all documents are searchable, from the text of a chunk until the gists of that chunk are made.

        Args:
            folder: of documents, or a single one; a folder that moved away keeps its index.
            index: folder of the index; made where it is missing.
            include: gitignore-style patterns; only files that match one of them count. None: as last time.
            exclude: gitignore-style patterns of files to leave out. None: as last time.
            rebuild: rebuild an index that has other settings, instead of refusing.
            verify: hash every gist file before it is trusted, and try skipped files again.
            delete: whether documents whose file is gone leave the index.
            prune: whether they do even if most are gone, as on a disk that is not mounted.
            gists: ``"background"`` has them made by a process of low priority, those of the chunks that questions
                retrieved first; ``"on demand"`` makes no others; ``"now"`` returns when all are made.
            engine: models already loaded.
            device: where to load them, such as ``cpu`` or ``cuda:0``.
            runtime: what answers, see `gistrag.Engine.load`.
            reranker: a cross-encoder that sorts the hits: hub id or folder.
            progress: receives the progress of the build; by default a bar where standard error is a terminal.
            model: base model, as all below a field of `IndexSettings`; None inherits the value of the index.
            embedder: hub id, folder, catalog name, or ``"auto"``: chosen by the scripts of the documents.
            adapter: folder or name of an adapter, ``"none"`` or ``"auto"``: the one shipped for the model. A new index
                takes ``"auto"``, and of placement and rate those that the adapter was trained for.
            placement: where gists come from.
            tokens_per_gist: source tokens that one gist token stands for.
            chunk_tokens: longest chunk.
            quantize: ``"nf4"`` loads the base model in 4 bits.
            kv_cache_dtype: numbers in gist files, ``"int8"`` or ``"auto"``, those of the model.

        Raises:
            UsageError: no such folder, a setting out of range, a malformed pattern, or most documents are gone; nothing
                was made or removed.
            ModelNotFoundError: a model is not where the index says, or not on this machine.
            FingerprintMismatchError: the index was made with other settings or models.
            IndexLockedError: another builder is at work.
            ResourceError: the disk is too small.
        """
        given = _given(
            model=model,
            embedder=embedder,
            adapter=adapter,
            placement=placement,
            tokens_per_gist=tokens_per_gist,
            chunk_tokens=chunk_tokens,
            quantize=quantize,
            kv_cache_dtype=kv_cache_dtype,
        )
        IndexSettings(**given)  # raises before anything is made
        documents, folder = Path(folder), folder_of(Path(folder), include)
        require_folder(folder, Path(index))
        require_patterns(include, exclude)
        require_models(Path(index), given, engine)
        with shown_or(progress) as shown, Store.build(index, command="gistrag build") as store:
            given = with_embedder(
                store, given, documents, engine=engine, rebuild=rebuild, include=include, exclude=exclude
            )
            wanted = inherited(store, given, rebuild=rebuild, engine=engine)
            require_source(store, folder)
            include = with_file(store, documents) if documents.is_file() else include
            engine = engine or Engine.load(wanted, device=device, reranker=reranker, runtime=runtime)
            configure(store, wanted, engine, folder, rebuild=rebuild)
            builder = Builder(store, runtime=engine.runtime, embedder=engine.embedder, progress=shown, verify=verify)
            report = builder.sync(folder, include=include, exclude=exclude, delete=delete, prune=prune)
            if gists == "now" and report.gists_pending:
                make_gists(store, engine.model, report, progress=shown)
        rag = cls(Store.open(index), engine)
        rag.report = report
        rag._start_worker(gists, device)
        return rag

    @classmethod
    def open(
        cls,
        index: str | Path = "index",
        *,
        gists: When = "none",
        engine: Engine | None = None,
        device: str | None = None,
        runtime: RuntimeName = "auto",
        reranker: str | None = None,
        model: str | None = None,
        embedder: str | None = None,
        adapter: str | None = None,
    ) -> Self:
        """Return a `GistRAG` over an existing index; nothing is ever written, unless *gists* says so.

        Args:
            gists: ``"background"`` and ``"on demand"`` as for `from_folder`, where the folder may be written.
            engine: models already loaded.
            device: where to load them, such as ``cpu`` or ``cuda:0``.
            runtime: what answers, see `gistrag.Engine.load`.
            reranker: a cross-encoder that sorts the hits: hub id or folder.
            model: where the base model is now, if not where the index says; it must be the same.
            embedder: where the embedder is now, likewise.
            adapter: where the adapter is now, likewise.

        Raises:
            IncompleteIndexError: no index there.
            ModelNotFoundError: a model is not where the index says.
            FingerprintMismatchError: it was made by other models than those on this machine.
        """
        places = placed(_given(model=model, embedder=embedder, adapter=adapter))
        store = Store.open(index)
        try:
            engine = engine or Engine.load(located(store, places), device=device, reranker=reranker, runtime=runtime)
            require_engine(store, engine)
        except BaseException:
            store.close()
            raise
        rag = cls(store, engine)
        rag._start_worker(gists, device, places)
        return rag

    @classmethod
    def for_texts(
        cls,
        index: str | Path = "index",
        *,
        engine: Engine | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> Self:
        """Return a `GistRAG` whose index holds no documents, only the gists of texts given to `compress`.

        An index that is there already is opened. A build of documents into the same folder would remove the gists
        of texts that are in no document.

        Args:
            settings: fields of `IndexSettings`, for a new index.

        Raises:
            FingerprintMismatchError: the index was made with other settings or models.
        """
        given = _given(**{name: None if value == "auto" else value for name, value in settings.items()})
        IndexSettings(**given)
        with Store.build(index, command="GistRAG.for_texts") as store:
            wanted = inherited(store, given, engine=engine, remedy=OTHER_INDEX)
            engine = engine or Engine.load(wanted, device=device)
            if store.is_new:
                configure(store, wanted, engine, Path(index) / "no-documents", rebuild=False)
            require_engine(store, engine, remedy=OTHER_INDEX)
        return cls(Store.open(index), engine)

    @property
    def model(self) -> GistModel:
        """The torch runtime, which makes gists; loaded at its first use where another runtime answers."""
        return self.engine.model

    def _start_worker(self, gists: When, device: str | None, places: Mapping[str, str] | None = None) -> None:
        self._worker = GistWorker(self.store, gists, device=device, places=places)
        self._worker.start()

    def close(self) -> None:
        """Close the index and end the work on its gists; the models stay as long as somebody holds them."""
        self._worker.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.store.stats()
        return f"GistRAG({str(self.folder)!r}, documents={stats.documents}, chunks={stats.chunks})"

    @property
    def progress(self) -> GistProgress:
        """How far the gists of the index are, and whether a worker of this object makes them."""
        return self._worker.progress

    def sync(self, *, delete: bool = True, prune: bool = False, progress: Progress | None = None) -> SyncReport:
        """Bring the index into step with its folder, by the patterns of its last build, and return what was done.

        Gists are made before it returns, unless a worker makes those of this index.

        Args:
            delete: whether documents whose file is gone leave the index; kept ones count as stale.
            prune: whether they do even if most are gone.
            progress: receives the progress.

        Raises:
            FingerprintMismatchError: another builder rebuilt the index with other settings or models.
        """
        with Store.build(self.folder, command="GistRAG.sync") as store:
            require_engine(store, self.engine)
            builder = Builder(store, runtime=self.runtime, embedder=self.engine.embedder, progress=progress)
            self.report = builder.sync(source_folder(store), delete=delete, prune=prune)
            if self.report.gists_pending and not self._worker.is_wanted:
                make_gists(store, self.model, self.report, progress=progress)
        self._worker.start()
        return self.report

    def import_documents(self, file: str | Path) -> list[str]:
        """Take documents that `export_documents` wrote into the index, and return their paths.

        They answer with the gists they bring, and are cited by their paths. A sync leaves them alone; documents that
        were imported before under the same path are replaced.

        Raises:
            UsageError: no such file, or a document of the folder has such a path.
            CorruptGistError: the file is cut or altered; nothing was changed, as in every other case.
            FingerprintMismatchError: its gists were made by another model, or with other settings.
            IndexLockedError: another builder is at work.
        """
        contents = document_file.read(Path(file))
        with Store.build(self.folder, command="GistRAG.import_documents") as store:
            require_engine(store, self.engine)
            require_gists(store, self.engine, contents.fingerprint, where=str(file))
            embedder = self.engine.embedder
            paths = importing.import_from(store, contents, Path(file), runtime=self.runtime, embedder=embedder)
        self._worker.start()
        return paths

    def remove_imported(self, paths: Sequence[str]) -> None:
        """Remove imported documents.

        Raises:
            UsageError: one of them was not imported.
            IndexLockedError: another builder is at work.
        """
        with Store.build(self.folder, command="GistRAG.remove_imported") as store:
            require_engine(store, self.engine)
            importing.remove_imported(store, paths, runtime=self.runtime, embedder=self.engine.embedder)

    def compress(self, texts: Sequence[str]) -> int:
        """Make the gists of *texts*, keep them in the index, and return how many were made now.

        `stream_from` finds the gists of a text by what the text says. Texts that are too short or too long for gists
        stay text.

        Raises:
            FingerprintMismatchError: the index was made with other settings or models.
            IndexLockedError: another builder is at work.
        """
        with Store.build(self.folder, command="GistRAG.compress") as store:
            require_engine(store, self.engine, remedy=OTHER_INDEX)
            return compress_texts(store, self.model, texts)

    def query(
        self,
        question: str,
        *,
        top_k: int = 3,
        mode: Mode = "gist",
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        second_reading: bool = True,
        history: Sequence[str] = (),
    ) -> Answer:
        """Return the answer to a question; `Options` explains every keyword.

        Raises:
            UsageError: an empty question, or an option out of range.
            ContextOverflowError: a question longer than the model's context window.
        """
        return self.stream(
            question,
            top_k=top_k,
            mode=mode,
            scope=scope,
            filters=filters,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            second_reading=second_reading,
            history=history,
        ).result()

    def stream(
        self,
        question: str,
        *,
        top_k: int = 3,
        mode: Mode = "gist",
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        second_reading: bool = True,
        history: Sequence[str] = (),
    ) -> Stream:
        """Return the same answer as an iterator over pieces of its text; work begins at the first ``next``."""
        options = Options(
            top_k=top_k,
            mode=mode,
            scope=scope,
            filters=filters,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            second_reading=second_reading,
            history=history,
        )
        return Stream(
            self.runtime,
            question,
            options,
            find=self._finder.find,
            nothing=self._finder.nothing,
            during=self._worker.paused,
            judge=self.engine.judge,
        )

    def stream_from(
        self,
        question: str,
        texts: Sequence[str],
        *,
        mode: Mode = "gist",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        second_reading: bool = True,
    ) -> Stream:
        """Return the answer to a question from *texts*, best first, that somebody else found.

        A text that equals a chunk, with its heading path on a line above, is answered from the chunk's gists. Any
        other text is compressed when it is first asked about.

        Raises:
            UsageError: an empty question, or an option out of range.
        """
        options = Options(
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            second_reading=second_reading,
        )
        return self._given.stream(question, texts, options)


def _given(**settings: Any) -> dict[str, Any]:
    """Return the settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}
