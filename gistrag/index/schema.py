"""What index.db holds: its tables, the statements that read and write them, and the rows as values.

Every statement is a constant and every value is bound; nothing is ever pasted into SQL. `gistrag.index.database`, which
alone knows SQLite, runs the statements.

A row of ``gists`` whose size is 0 stands for a gist that is still to be made; its chunks are read as text until then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT_VERSION = 1
SUMMARY_ORDINAL = -1
"""Ordinal of the summary of a document; its chunks have those from 0."""
APPLICATION_ID = 0x67697374  # "gist"

BUILDER_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA secure_delete = ON",
)
CREATE_SUMMARIES = """CREATE TABLE IF NOT EXISTS summaries (
        document_id INTEGER PRIMARY KEY REFERENCES documents ON DELETE CASCADE, made_from TEXT NOT NULL,
        title TEXT NOT NULL, text TEXT NOT NULL, tokens INTEGER NOT NULL, end_char INTEGER NOT NULL,
        sha256 TEXT NOT NULL, vectors BLOB NOT NULL, parts INTEGER NOT NULL) STRICT"""
CREATE_METADATA = """CREATE TABLE IF NOT EXISTS metadata (
        document_id INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        chunk_id INTEGER REFERENCES chunks ON DELETE CASCADE, name TEXT NOT NULL, value TEXT NOT NULL) STRICT"""
CREATE_METADATA_INDEX = "CREATE INDEX metadata_by_document ON metadata (document_id, chunk_id)"
CREATE_METADATA_CHUNK_INDEX = "CREATE INDEX metadata_by_chunk ON metadata (chunk_id)"
CREATE_PAIRS = (
    "CREATE VIRTUAL TABLE IF NOT EXISTS pairs USING fts5 (text, tokenize = 'unicode61')",
    """CREATE TRIGGER IF NOT EXISTS pairs_out AFTER DELETE ON chunks BEGIN
        DELETE FROM pairs WHERE rowid = old.id; END""",
)
SCHEMA = (
    "PRAGMA application_id = 0x67697374",
    "PRAGMA user_version = 1",
    "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    """CREATE TABLE documents (
        id INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL, size INTEGER NOT NULL,
        mtime_ns INTEGER NOT NULL, kind TEXT NOT NULL, stale INTEGER NOT NULL DEFAULT 0,
        gists_by TEXT NOT NULL, vectors_by TEXT NOT NULL) STRICT""",
    """CREATE TABLE gists (
        key TEXT PRIMARY KEY CHECK (length(key) = 64 AND key NOT GLOB '*[^0-9a-f]*'), sha256 TEXT NOT NULL,
        size INTEGER NOT NULL, gists INTEGER NOT NULL, source_tokens INTEGER NOT NULL) STRICT""",
    """CREATE TABLE chunks (
        id INTEGER PRIMARY KEY AUTOINCREMENT, document_id INTEGER NOT NULL REFERENCES documents ON DELETE CASCADE,
        ordinal INTEGER NOT NULL, start_char INTEGER NOT NULL, end_char INTEGER NOT NULL, page INTEGER,
        tokens INTEGER NOT NULL, gist_key TEXT REFERENCES gists, sha256 TEXT NOT NULL, heading TEXT NOT NULL,
        text TEXT NOT NULL, UNIQUE (document_id, ordinal)) STRICT""",
    "CREATE INDEX chunks_by_gist ON chunks (gist_key)",
    """CREATE TABLE vectors (
        id INTEGER PRIMARY KEY AUTOINCREMENT, chunk_id INTEGER NOT NULL REFERENCES chunks ON DELETE CASCADE,
        vector BLOB NOT NULL) STRICT""",
    "CREATE INDEX vectors_by_chunk ON vectors (chunk_id)",
    "CREATE TABLE skipped (path TEXT PRIMARY KEY, sha256 TEXT NOT NULL, reason TEXT NOT NULL) STRICT",
    CREATE_SUMMARIES,
    CREATE_METADATA,
    CREATE_METADATA_INDEX,
    CREATE_METADATA_CHUNK_INDEX,
    """CREATE VIRTUAL TABLE words USING fts5 (
        text, heading, content = 'chunks', content_rowid = 'id', tokenize = 'porter unicode61')""",
    """CREATE TRIGGER words_in AFTER INSERT ON chunks BEGIN
        INSERT INTO words (rowid, text, heading) VALUES (new.id, new.text, new.heading); END""",
    """CREATE TRIGGER words_out AFTER DELETE ON chunks BEGIN
        INSERT INTO words (words, rowid, text, heading) VALUES ('delete', old.id, old.text, old.heading); END""",
    *CREATE_PAIRS,
)

DOCUMENTS = """
    SELECT id, path, sha256, size, mtime_ns, kind,
        (SELECT count(*) FROM chunks WHERE document_id = documents.id),
        (SELECT coalesce(sum(tokens), 0) FROM chunks WHERE document_id = documents.id),
        stale, gists_by = :gists_by, vectors_by = :vectors_by
    FROM documents ORDER BY path"""
CHUNKS = """
    SELECT c.id, c.document_id, d.path, c.ordinal, c.start_char, c.end_char, c.text, c.heading, c.page, c.tokens,
        c.gist_key, c.sha256
    FROM chunks c JOIN documents d ON d.id = c.document_id"""
CHUNKS_BY_ID = CHUNKS + " WHERE c.id IN (SELECT value FROM json_each(?))"
CHUNKS_BY_GIST = CHUNKS + " WHERE c.gist_key = ?"
CHUNKS_BY_PATH = CHUNKS + " WHERE d.path = ? ORDER BY c.ordinal"
PRESENT = "SELECT id FROM chunks WHERE id IN (SELECT value FROM json_each(?))"
SELECT = """
    SELECT c.id FROM chunks c JOIN documents d ON d.id = c.document_id
    WHERE (:scope IS NULL OR d.path = :scope) AND (:path IS NULL OR d.path GLOB :path)
        AND (:kind IS NULL OR d.kind = :kind) AND (:heading IS NULL OR EXISTS (
            SELECT 1 FROM json_each(c.heading) WHERE instr(casefold(value), casefold(:heading))))"""
KEYWORDS = """
    SELECT rowid, -rank FROM words
    WHERE words MATCH :match AND (:ids IS NULL OR rowid IN (SELECT value FROM json_each(:ids)))
    ORDER BY rank, rowid LIMIT :k"""
KEYWORDS_AND_PAIRS = """
    SELECT id, sum(score) FROM (
        SELECT rowid AS id, -rank AS score FROM words WHERE words MATCH :match
        UNION ALL SELECT rowid, -rank FROM pairs WHERE pairs MATCH :pairs)
    WHERE :ids IS NULL OR id IN (SELECT value FROM json_each(:ids))
    GROUP BY id ORDER BY sum(score) DESC, id LIMIT :k"""
HAS_PAIRS = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'pairs'"
WITHOUT_PAIRS = """
    SELECT id, heading, text FROM chunks
    WHERE NOT EXISTS (SELECT 1 FROM pairs WHERE rowid = chunks.id) ORDER BY id LIMIT ?"""
PAIRS_OF_CHUNKS = "SELECT c.id, c.heading, c.text, p.text FROM chunks c LEFT JOIN pairs p ON p.rowid = c.id"
VECTORS = """
    SELECT v.id, v.chunk_id, v.vector FROM vectors v
    JOIN chunks c ON c.id = v.chunk_id JOIN documents d ON d.id = c.document_id
    WHERE v.id > :after AND d.vectors_by = :vectors_by ORDER BY v.id"""
GISTS = "SELECT key, sha256, size, gists, source_tokens FROM gists WHERE size > 0 ORDER BY key"
GIST_TOTALS = "SELECT count(*), coalesce(sum(gists), 0), coalesce(sum(size), 0) FROM gists WHERE size > 0"
GIST = "SELECT key, sha256, size, gists, source_tokens FROM gists WHERE key = ? AND size > 0"
IS_PENDING = "SELECT 1 FROM gists WHERE key = ? AND size = 0"
PENDING = """
    SELECT DISTINCT g.key, g.source_tokens FROM gists g
    JOIN chunks c ON c.gist_key = g.key JOIN documents d ON d.id = c.document_id
    WHERE g.size = 0 AND d.gists_by = :gists_by"""
PENDING_CHUNKS = (
    CHUNKS
    + """ JOIN gists g ON g.key = c.gist_key
    WHERE g.size = 0 AND d.gists_by = :gists_by
        AND (:ids IS NULL OR c.id IN (SELECT value FROM json_each(:ids)))
    ORDER BY d.path, c.ordinal LIMIT :most"""
)
GIST_CHUNKS = """
    SELECT count(*), coalesce(sum(g.size = 0), 0) FROM gists g
    JOIN chunks c ON c.gist_key = g.key JOIN documents d ON d.id = c.document_id WHERE d.gists_by = :gists_by"""
UNRECORDED = "SELECT gist_key FROM chunks WHERE gist_key NOT IN (SELECT key FROM gists)"
DROP_UNUSED_GISTS = "DELETE FROM gists WHERE key NOT IN (SELECT gist_key FROM chunks WHERE gist_key IS NOT NULL)"
MARK_SEEN = "UPDATE documents SET size = ?, mtime_ns = ?, stale = 0 WHERE path = ?"
EXPECT_GIST = """
    INSERT INTO gists (key, sha256, size, gists, source_tokens) VALUES (?, '', 0, 0, ?)
    ON CONFLICT (key) DO UPDATE SET sha256 = '', size = 0, gists = 0, source_tokens = excluded.source_tokens"""
LEAVE_AS_TEXT = "UPDATE chunks SET gist_key = NULL, sha256 = ? WHERE id = ?"
PUT_GIST = """
    INSERT INTO gists (key, sha256, size, gists, source_tokens) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET sha256 = excluded.sha256, size = excluded.size, gists = excluded.gists,
        source_tokens = excluded.source_tokens"""
PUT_DOCUMENT = """
    INSERT INTO documents (path, sha256, size, mtime_ns, kind, gists_by, vectors_by) VALUES (?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (path) DO UPDATE SET sha256 = excluded.sha256, size = excluded.size, mtime_ns = excluded.mtime_ns,
        kind = excluded.kind, stale = 0, gists_by = excluded.gists_by, vectors_by = excluded.vectors_by
    RETURNING id"""
PUT_CHUNK = """
    INSERT INTO chunks (document_id, ordinal, start_char, end_char, text, heading, page, tokens, gist_key, sha256)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id"""

HAS_SUMMARIES = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'summaries'"
TITLES = """
    SELECT d.path, s.title, (SELECT heading FROM chunks WHERE document_id = d.id ORDER BY ordinal LIMIT 1)
    FROM documents d LEFT JOIN summaries s ON s.document_id = d.id ORDER BY d.path"""
FIRST_HEADINGS = """
    SELECT d.path, '', (SELECT heading FROM chunks WHERE document_id = d.id ORDER BY ordinal LIMIT 1)
    FROM documents d ORDER BY d.path"""
SUMMARY = """
    SELECT d.id, d.path, d.sha256, s.made_from, s.title, s.text, s.tokens, s.end_char, s.sha256
    FROM summaries s JOIN documents d ON d.id = s.document_id WHERE d.id = ?"""
SUMMARY_VECTORS = """
    SELECT d.id, d.path, d.sha256, s.made_from, s.vectors, s.parts
    FROM summaries s JOIN documents d ON d.id = s.document_id
    WHERE d.vectors_by = :vectors_by ORDER BY d.id"""
SUMMARIZED = """
    SELECT d.id, d.path, d.sha256, d.kind, s.made_from
    FROM documents d LEFT JOIN summaries s ON s.document_id = d.id
    WHERE EXISTS (SELECT 1 FROM chunks WHERE document_id = d.id AND ordinal = 1) ORDER BY d.path"""
PUT_SUMMARY = """
    INSERT OR REPLACE INTO summaries
        (document_id, made_from, title, text, tokens, end_char, sha256, vectors, parts)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
DROP_SUMMARIES = """
    DELETE FROM summaries WHERE document_id NOT IN (
        SELECT d.id FROM documents d WHERE EXISTS (SELECT 1 FROM chunks WHERE document_id = d.id AND ordinal = 1))"""

HAS_METADATA = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'metadata'"
METADATA = """
    SELECT -document_id, name, value FROM metadata
    WHERE document_id IN (SELECT value FROM json_each(:documents)) AND chunk_id IS NULL AND name <> ''
    UNION ALL
    SELECT chunk_id, name, value FROM metadata WHERE chunk_id IN (SELECT value FROM json_each(:chunks))"""
SELECT_METADATA = """
    WITH passing AS (
        SELECT document_id, chunk_id FROM metadata WHERE name = :name AND CASE :name
            WHEN 'date' THEN CASE :op
                WHEN '>=' THEN substr(value, 1, length(:value)) >= :value
                WHEN '<=' THEN substr(value, 1, length(:value)) <= :value
                WHEN '>' THEN substr(value, 1, length(:value)) > :value
                WHEN '<' THEN substr(value, 1, length(:value)) < :value
                ELSE substr(value, 1, length(:value)) = :value END
            ELSE CASE :op
                WHEN '==' THEN casefold(value) = casefold(:value)
                ELSE instr(casefold(value), casefold(:value)) > 0 END END)
    SELECT id FROM chunks WHERE id IN (SELECT chunk_id FROM passing WHERE chunk_id IS NOT NULL)
    UNION
    SELECT id FROM chunks WHERE document_id IN (SELECT document_id FROM passing WHERE chunk_id IS NULL)"""
WITHOUT_METADATA = """
    SELECT d.path, d.size, d.mtime_ns, d.sha256 FROM documents d WHERE NOT d.stale AND NOT EXISTS (
        SELECT 1 FROM metadata m WHERE m.document_id = d.id AND m.chunk_id IS NULL AND m.name = ''
            AND m.value = :version || ' ' || d.sha256 || ' ' || d.path)
    ORDER BY d.path"""
MISPLACED = """
    SELECT d.id FROM json_each(?) asked JOIN documents d ON d.id = asked.value
    JOIN metadata m ON m.document_id = d.id AND m.chunk_id IS NULL AND m.name = ''
    WHERE substr(m.value, instr(m.value, ' ') + 1, length(d.sha256) + 1) = d.sha256 || ' '
        AND substr(m.value, instr(m.value, ' ') + length(d.sha256) + 2) <> d.path"""
OUTDATE_METADATA = """
    DELETE FROM metadata WHERE document_id = (SELECT id FROM documents WHERE path = ?)
        AND chunk_id IS NULL AND name = ''"""
DROP_METADATA = "DELETE FROM metadata WHERE document_id = (SELECT id FROM documents WHERE path = ?)"
PUT_METADATA = (
    "INSERT INTO metadata (chunk_id, name, value, document_id) SELECT ?, ?, ?, id FROM documents WHERE path = ?"
)


@dataclass(frozen=True)
class DocumentRow:
    """A document of the index; ``gists_current`` and ``vectors_current`` are false where another model made them."""

    id: int
    path: str
    sha256: str
    size: int
    mtime_ns: int
    kind: str
    chunks: int
    tokens: int
    stale: bool
    gists_current: bool
    vectors_current: bool


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of the index; its id is never given to another one. ``gist_key`` is None where text is cheaper.

    The summary of a document is one too, see `gistrag.index.summaries`. ``metadata`` are those of the document, or of
    the part of it that the chunk is in.
    """

    id: int
    document_id: int
    path: str
    ordinal: int
    start: int
    end: int
    text: str
    heading: tuple[str, ...]
    page: int | None
    tokens: int
    gist_key: str | None
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class GistRow:
    """What the index records of a gist file: the sha256 and the bytes of the whole file, and what is inside."""

    key: str
    sha256: str
    size: int
    gists: int
    source_tokens: int


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals of an index; ``gists`` counts gist tokens in ``gist_files`` files of ``gist_bytes`` together.

    ``gist_chunks`` of the chunks are to be read as gists, ``pending_chunks`` of those as text until theirs are made.
    """

    documents: int
    stale: int
    skipped: int
    chunks: int
    tokens: int
    gist_files: int
    gists: int
    gist_bytes: int
    gist_chunks: int
    pending_chunks: int
    kinds: dict[str, int]
