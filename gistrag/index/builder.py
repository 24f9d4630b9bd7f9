"""Syncing an index with its folder of documents: only what changed is computed again.

::

    files ─ find ─┬─ same content           nothing
                  ├─ same content, new path  rename
                  ├─ new or changed          load → chunk → embed → commit      and later: compress → commit
                  └─ gone                    remove

A build has two stages. `Builder.sync` brings documents, chunks and vectors into the index, one document at a time;
from its first commit on the index answers, from text where a gist is missing. `gistrag.index.gist_maker` then makes the
gists, at once or in the background. A build that is killed loses at most one batch of either stage, and the next one
goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from gistrag.compression.making import is_compressible
from gistrag.documents.chunking import Chunk
from gistrag.documents.cutting import GuardedChunker
from gistrag.documents.discovery import Document, FoundFile, Skipped, load
from gistrag.documents.text import Part
from gistrag.errors import CorruptGistError, DocumentError, GistNotFoundError, ResourceError, UnreadableError
from gistrag.index import doubt, manifest
from gistrag.index.changes import Changes, compared
from gistrag.index.chunk_rows import damaged_documents
from gistrag.index.coverage import Sample
from gistrag.index.embedder import Embedder
from gistrag.index.folder_record import set_left_out
from gistrag.index.integrity import remove_unused
from gistrag.index.retriever import write_vector_file
from gistrag.index.schema import DocumentRow, GistRow, StoredChunk
from gistrag.index.store import IndexedChunk, Store, index_words
from gistrag.index.summaries import Missing, as_chunk, summary_of
from gistrag.model.runtime import AnyRuntime
from gistrag.progress import NoProgress, Progress, ReadingProgress
from gistrag.storage import files

logger = logging.getLogger("gistrag")

BATCH_CHUNKS = 64
"""Chunks that are embedded and committed at a time."""


@dataclass(kw_only=True)
class SyncReport:
    """What a build did: paths by what happened to them, and totals.

    Attributes:
        added, changed, removed: paths of documents.
        renamed: ``old → new``; these paths are in no other list.
        unchanged: how many documents were left alone.
        skipped: files that are no documents.
        left_out: how many files no reader knows, by suffix; ``""`` counts those without one.
        chunks: how many were indexed now.
        tokens: source tokens compressed now.
        gists_made: gist files written now.
        gists_found: gist files reused from an earlier build or an equal chunk.
        gists_pending: how many are still to be made.
        without_gist: chunks that are read as text, because they are too short or their gists are not finite.
        gist_bytes: bytes of keys and values written now.
        coverage: a sentence for each script in the documents that reader or embedder hardly know.
        seconds: how long the build took.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    chunks: int = 0
    tokens: int = 0
    gists_made: int = 0
    gists_found: int = 0
    gists_pending: int = 0
    without_gist: int = 0
    gist_bytes: int = 0
    coverage: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Work:
    """One chunk to index, and whether its document ends with it."""

    document: Document
    chunk: Chunk
    is_last: bool


class Builder:
    """Syncs one index with its folder.

    Args:
        store: open for writing and configured.
        runtime: cuts the text into the tokens that gists are made of.
        embedder: makes the vectors.
        progress: receives what is planned and done.
        verify: hash every gist file before it is trusted, and try again what was skipped before.

    Attributes:
        report: what was done so far.
    """

    def __init__(
        self,
        store: Store,
        *,
        runtime: AnyRuntime,
        embedder: Embedder,
        progress: Progress | None = None,
        verify: bool = False,
    ) -> None:
        self.report = SyncReport()
        self._store, self._runtime, self._embedder = store, runtime, embedder
        self._progress = progress or NoProgress()
        self._verify = verify
        self._settings = store.settings
        self._sample = Sample()
        self._is_doubtful = False

    def sync(
        self,
        folder: str | Path,
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        delete: bool = True,
        prune: bool = False,
    ) -> SyncReport:
        """Bring the documents of *folder* into the index, and return what was done; gists are left pending.

        Args:
            folder: of documents.
            include: gitignore-style patterns; where there are any, only files they match. None: as last time.
            exclude: gitignore-style patterns of files to leave out. None: as last time.
            delete: whether documents whose file is gone are removed, or kept and marked stale.
            prune: whether this holds even if most of them are gone.

        Raises:
            UsageError: no such folder, or most of its documents are gone; nothing was removed.
            ResourceError: the disk is full.
        """
        started_s = time.monotonic()
        self._look_for_doubt()
        found = compared(
            self._store,
            folder,
            include=include,
            exclude=exclude,
            is_current=self._is_current,
            removes_any=prune or not delete,
            read_all=self._verify,
        )
        self.report.left_out = found.left_out
        self._store.set_patterns(**found.patterns)
        self._refresh(found.imported)
        self._apply(found.changes, keep_gone=not delete)
        self._store.pairs.prepare(verify=self._verify or self._is_doubtful)
        self.report.skipped.extend(found.skipped)
        self._index(folder, found.changes.to_read, found.known)
        self._describe(folder)
        self._check_coverage()
        self._summarize()
        self.report.skipped.sort(key=lambda row: row.path)
        self._finish()
        self.report.gists_pending = len(self._store.gists.pending())
        self.report.seconds = time.monotonic() - started_s
        return self.report

    def _look_for_doubt(self) -> None:
        """Make keywords, and later vectors, anew where index.db is not what the last build left."""
        found = doubt.recorded(self._store.database)
        self._is_doubtful = bool(found)
        if found:
            logger.warning("%s; its keywords and vectors are made again", found)
            index_words(self._store)

    def _apply(self, differing: Changes, *, keep_gone: bool) -> None:
        """Record what is clear without reading a file: unchanged, renamed, hidden, gone."""
        for path in [*differing.hidden, *(differing.gone if keep_gone else ())]:
            self._store.mark_stale(path)
        for before, file in differing.renamed:
            self._store.rename_document(before, file.path)
            self.report.renamed.append(f"{before} → {file.path}")
        for file in [*differing.unchanged, *(file for _, file in differing.renamed)]:
            self._store.mark_seen(file.path, size=file.size, mtime_ns=file.mtime_ns)
        self.report.unchanged += len(differing.unchanged)
        if not keep_gone:
            for path in differing.gone:
                self._store.remove_document(path)
            self.report.removed.extend(differing.gone)

    def _is_current(self, row: DocumentRow) -> bool:
        """Return whether no part of a document has to be computed again."""
        return row.gists_current and row.vectors_current and row.id not in self._damaged

    @cached_property
    def _damaged(self) -> set[int]:
        """Ids of documents with a damaged chunk, or a gist that is missing or differs from its record.

        All documents where index.db was changed: keywords and vectors have no hash of their own.
        """
        if self._is_doubtful:
            return {row.id for row in self._store.documents()}
        gists = self._store.gists
        broken = {row.key for row in gists.rows() if not self._is_sound(row)} | gists.unrecorded()
        damaged = set(damaged_documents(self._store.database))
        return {row.id for row in self._store.documents() if row.path in damaged or self._uses(row, broken)}

    def _uses(self, row: DocumentRow, keys: set[str]) -> bool:
        return bool(keys) and any(chunk.gist_key in keys for chunk in self._store.chunks_of(row.path))

    def _is_sound(self, row: GistRow) -> bool:
        """Return whether a gist file is as recorded; one that did not change since the last build is not read."""
        try:
            status = self._store.gists.path(row.key).stat()
            if status.st_size != row.size:
                return False
            if self._verify or status.st_ctime_ns > self._store.gists.checked_ns:  # a file moved here keeps its mtime
                self._store.gists.load(row.key)
        except (OSError, GistNotFoundError, CorruptGistError) as error:
            if files.is_shortage(error.__cause__ if isinstance(error, CorruptGistError) else error):
                raise ResourceError(str(error)) from error  # or sound gists would be made again
            return False
        return True

    def _index(self, folder: str | Path, pending: Sequence[FoundFile], known: Mapping[str, DocumentRow]) -> None:
        """Embed and commit, batch by batch; a document is put when its last chunk is embedded."""
        finished: list[IndexedChunk] = []
        done = 0
        self._show_read(0, len(pending))
        for batch in _batches(self._work(folder, pending, known)):
            vectors = self._embedder.embed_documents([work.chunk.search_text for work in batch])
            for work, parts in zip(batch, vectors, strict=True):
                finished.append(IndexedChunk(chunk=work.chunk, gist_key=self._key(work.chunk), vectors=parts))
                if work.is_last:
                    self._store.replace_document(work.document, finished)
                    finished = []
                    done += 1
            self._store.commit()
            self.report.chunks += len(batch)
            self._show_read(done, len(pending))

    def _describe(self, folder: str | Path) -> None:
        """Store the metadata of documents that were indexed without, or under another path."""
        self._store.metadata.prepare()
        for file in self._store.metadata.missing():
            try:
                document = load(folder, file)
            except UnreadableError:
                continue  # the next build looks at it again
            except DocumentError:
                document = Document(**asdict(file), kind="", text="")
            if document.sha256 == file.sha256:
                chunks = self._store.chunks_of(file.path)
                self._store.metadata.put(document, [(chunk.id, chunk.start) for chunk in chunks])

    def _check_coverage(self) -> None:
        """Say which scripts of the documents that were read now suffer with these models."""
        tokenizer, unknown_share = self._runtime.text_tokenizer, self._embedder.unknown_share
        self.report.coverage = self._sample.verdicts(self._settings.model, tokenizer, unknown_share)
        for sentence in self.report.coverage:
            logger.warning("%s", sentence)

    def _refresh(self, imported: Set[str]) -> None:
        """Embed imported documents again, and expect their gists, where other models made them or a gist is gone."""
        for row in self._store.documents():
            if row.path in imported and not self._is_current(row):
                names = ("ordinal", "start", "end", "text", "heading", "page", "tokens")
                stored = self._store.metadata.added_to(self._store.chunks_of(row.path))
                chunks = [Chunk(**{name: getattr(one, name) for name in names}) for one in stored]
                vectors = self._embedder.embed_documents([chunk.search_text for chunk in chunks])
                entries = [
                    IndexedChunk(chunk=chunk, gist_key=self._key(chunk), vectors=parts)
                    for chunk, parts in zip(chunks, vectors, strict=True)
                ]
                about = {name: getattr(row, name) for name in ("path", "sha256", "size", "mtime_ns", "kind")}
                parts = tuple(Part(one.start, one.metadata) for one in stored)
                self._store.replace_document(Document(**about, text="", parts=parts), entries)
                self._store.commit()

    def _summarize(self) -> None:
        """Store the summaries that are missing or outdated, batch by batch; a build that was stopped goes on."""
        summaries = self._store.summaries
        summaries.prepare()
        summaries.drop_orphans()
        missing = iter(list(summaries.missing()))
        while batch := list(islice(missing, BATCH_CHUNKS)):
            made = [(one, self._summary(one, chunks)) for one in batch if (chunks := self._store.chunks_of(one.path))]
            vectors = self._embedder.embed_documents([chunk.text for _, chunk in made])
            for (one, chunk), parts in zip(made, vectors, strict=True):
                summaries.put(one, chunk, parts)
            self._store.commit()

    def _summary(self, of: Missing, chunks: Sequence[StoredChunk]) -> StoredChunk:
        summary = summary_of(of.path, chunks, of.kind)
        tokens = len(self._runtime.text_tokenizer.encode(summary.text, add_special_tokens=False))
        return as_chunk(summary, chunks, tokens=tokens)

    def _show_read(self, documents: int, of: int) -> None:
        if of and isinstance(self._progress, ReadingProgress):
            self._progress.read(documents=documents, of=of)

    def _work(
        self, folder: str | Path, pending: Sequence[FoundFile], known: Mapping[str, DocumentRow]
    ) -> Iterator[_Work]:
        """Yield the chunks of each document that can be read, one document after the other, and note those that cannot.

        A document is read when the chunks of the one before were taken, so that only a batch is ever held.
        """
        reasons = {(row.path, row.sha256): row.reason for row in self._store.skipped()}
        chunker = GuardedChunker(self._runtime.text_tokenizer, chunk_tokens=self._settings.chunk_tokens)
        for file in pending:
            try:
                if (file.path, file.sha256) in reasons and not self._verify:  # the same bytes failed before
                    raise DocumentError(reasons[file.path, file.sha256])
                document = load(folder, file)
                chunks = chunker.split(document)
                self._sample.add(document.text)
            except UnreadableError as error:  # the next build looks at it again
                self.report.skipped.append(Skipped(path=file.path, sha256="", reason=str(error)))
                self._store.mark_stale(file.path)
            except DocumentError as error:
                self.report.skipped.append(Skipped(path=file.path, sha256=file.sha256, reason=str(error)))
                self._store.remove_document(file.path)
            else:
                (self.report.changed if file.path in known else self.report.added).append(file.path)
                yield from (_Work(document, chunk, chunk is chunks[-1]) for chunk in chunks)

    def _key(self, chunk: Chunk) -> str | None:
        """Return the key of a chunk's gist, found on the disk or still to be made; None where text is cheaper."""
        ids = self._runtime.encode_passage(chunk.text, chunk.heading)
        if not is_compressible(self._runtime, ids, self._settings.gists):
            self.report.without_gist += 1
            return None
        key, gists = self._store.gists.key(ids), self._store.gists
        if gists.reuse(key):
            self.report.gists_found += 1
        else:
            gists.expect(key, source_tokens=len(ids))
        return key

    def _finish(self) -> None:
        """Commit what is left, write the vector file, and remove what nothing refers to."""
        self._store.set_skipped(self.report.skipped)
        set_left_out(self._store, self.report.left_out)
        self._store.gists.set_checked()
        if self._is_doubtful:
            doubt.settle(self._store.database)
        self._seal()

    def settle(self) -> None:
        """Summarize, commit and write the vector file after documents were put or removed by others."""
        self._summarize()
        self._seal()

    def _seal(self) -> None:
        self._store.commit()
        write_vector_file(self._store)
        remove_unused(self._store)
        manifest.write(self._store)


def _batches(works: Iterator[_Work]) -> Iterator[list[_Work]]:
    """Yield works in order, in batches of `BATCH_CHUNKS`."""
    while batch := list(islice(works, BATCH_CHUNKS)):
        yield batch
