"""Which settings a build uses, and whether folder, index and models belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gistrag.documents.patterns import names_one_file, only
from gistrag.engine import Engine
from gistrag.errors import IndexFolderError, ModelNotFoundError, UsageError
from gistrag.index.choice import chosen_embedder, is_here
from gistrag.index.config import PLACES, is_path
from gistrag.index.embedder import Embedder
from gistrag.index.fingerprint import embedder_fingerprint
from gistrag.index.store import Store
from gistrag.model.gguf import converted
from gistrag.model.hashing import folder_sha256
from gistrag.model.hub import CATALOG, adapter_name, find, find_adapter
from gistrag.model.identity import model_identity, recognized
from gistrag.settings import (
    AUTO,
    DEFAULT_EMBEDDER,
    DEFAULT_MODEL,
    MULTILINGUAL_EMBEDDER,
    AdapterSettings,
    IndexSettings,
)
from gistrag.storage import files
from gistrag.storage.fingerprint import require_same

REBUILD = "run `gistrag build --rebuild` to make it again, or name another --index"
FROM_ADAPTER = ("adapter", "placement", "tokens_per_gist")


def inherited(
    store: Store, given: Mapping[str, Any], *, rebuild: bool = False, engine: Engine | None, remedy: str = REBUILD
) -> IndexSettings:
    """Return the settings to build with: those of the index, unless it is new or rebuilt.

    Where a model or adapter is named by a path, the path may be another: `require_engine` looks at what is there.

    Raises:
        FingerprintMismatchError: *given* differs from what the index has.
    """
    given = placed(given)
    if store.is_new:
        return fresh(given, engine)
    stored = asdict(store.settings)
    if rebuild:
        is_other = not {"model", "adapter"}.isdisjoint(given)
        kept = {name: value for name, value in stored.items() if not (is_other and name in FROM_ADAPTER)}
        return fresh({**kept, **given}, engine)
    named = {name: value for name, value in given.items() if (name, value) != ("adapter", "auto")}
    moved = {one: named.pop(one) for one in PLACES if one in named and (is_path(named[one]) or is_path(stored[one]))}
    require_same(_texts(stored), _texts({**stored, **named}), where=f"the index in {store.folder}", remedy=remedy)
    return require_places(store, replace(store.settings, **moved))


def placed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose relative paths of models are absolute ones, so that they outlive the working folder."""
    known = {entry.name for entry in CATALOG}
    paths = {name: given[name] for name in PLACES if name in given and given[name] not in known}
    found = {name: Path(path).expanduser() for name, path in paths.items()}
    return {**given, **{name: os.path.normpath(path.absolute()) for name, path in found.items() if path.exists()}}


def located(store: Store, given: Mapping[str, Any]) -> IndexSettings:
    """Return the settings of an index with its models where *given* says they are now; `require_engine` compares them.

    Raises:
        ModelNotFoundError: as for `require_places`.
    """
    return require_places(store, replace(store.settings, **placed(given)))


def require_places(store: Store, settings: IndexSettings) -> IndexSettings:
    """Return the settings if something is wherever they name a path.

    Raises:
        ModelNotFoundError: names the path and the options that say where model and adapter are now.
    """
    for name in PLACES:
        if is_path(path := getattr(settings, name)) and not Path(path).exists():
            raise ModelNotFoundError(
                f"the index in {store.folder} has its {name} at {path}, where nothing is now; say where model and "
                "adapter are with --model and --adapter (and the embedder with --embedder; in Python model=, adapter=, "
                "embedder=)"
            )
    return settings


def with_embedder(
    store: Store | None,
    given: Mapping[str, Any],
    documents: Path,
    *,
    engine: Engine | None,
    rebuild: bool,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
) -> dict[str, Any]:
    """Return the settings *given* with an embedder in place of none or ``"auto"``: for a new index the chosen one.

    An index keeps its embedder, unless it is rebuilt with ``"auto"``.
    """
    if given.get("embedder", AUTO) != AUTO:
        return dict(given)
    rest = {name: value for name, value in given.items() if name != "embedder"}
    if store and not store.is_new and not (rebuild and "embedder" in given):
        return rest
    if engine:
        return {**rest, "embedder": engine.embedder_name}
    wanted = [only(documents.name)] if documents.is_file() else include
    folder = folder_of(documents, include)
    return {**rest, "embedder": chosen_embedder(folder, include=wanted or (), exclude=exclude or ())}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def fresh(given: Mapping[str, Any], engine: Engine | None) -> IndexSettings:
    """Return the settings of a new index: what is given, and for the rest what the adapter was trained for."""
    if engine:
        folder = engine.adapter_folder
    else:
        folder = find_adapter(given.get("adapter", "auto"), find(given.get("model", DEFAULT_MODEL)).path)
    adapter = AdapterSettings.read(folder) if folder else None
    return IndexSettings.fitting({**given, "adapter": adapter_name(folder)}, adapter)


def configure(store: Store, settings: IndexSettings, engine: Engine, folder: Path, *, rebuild: bool) -> None:
    """Record what the index is made with, and where its folder of documents is now.

    Raises:
        UsageError: chunks are too long for the model's context window.
        FingerprintMismatchError: the models differ from those of an index that is neither new nor rebuilt.
    """
    room = (engine.runtime.window - engine.runtime.prefix_slots) // 2  # compression reads a chunk twice in one window
    if settings.chunk_tokens > room:
        raise UsageError(
            f"chunk_tokens must be at most {room} with this model's context window, got {settings.chunk_tokens}"
        )
    gists_by = vectors_by = None
    if not (store.is_new or rebuild):
        require_engine(store, engine)
        gists_by, vectors_by = store.config.gist_fingerprint, store.config.embedder_fingerprint
    store.configure(
        settings,
        source=os.path.relpath(folder, store.folder),
        gist_fingerprint=engine.gist_fingerprint(settings, made_with=gists_by),
        embedder_fingerprint=embedder_fingerprint(engine.embedder, made_with=vectors_by),
    )


def require_engine(store: Store, engine: Engine, *, remedy: str = REBUILD) -> None:
    """Return if the models are those the index was made with.

    Raises:
        FingerprintMismatchError: names what differs.
    """
    where = f"the index in {store.folder}"
    stored = {
        name: value for name, value in store.config.gist_fingerprint.items() if name != "min_quality"
    }  # version 0.1
    require_same(stored, engine.gist_fingerprint(store.settings, made_with=stored), where=where, remedy=remedy)
    require_embedder(store, engine.embedder, remedy=remedy)


def require_embedder(store: Store, embedder: Embedder, *, remedy: str = REBUILD) -> None:
    """Return if the embedder is the one the index was made with.

    Raises:
        FingerprintMismatchError: names what differs.
    """
    where = f"the index in {store.folder}"
    stored = store.config.embedder_fingerprint
    require_same(stored, embedder_fingerprint(embedder, made_with=stored), where=where, remedy=remedy)


def require_models(index: Path, given: Mapping[str, Any], engine: Engine | None) -> None:
    """Return if the models of a new index are on this machine, before anything of it is made.

    Raises:
        ModelNotFoundError: with the command that brings the model.
    """
    if engine is None and not files.exists(index / "index.db"):
        name = fresh({"embedder": AUTO, **given}, None).embedder
        if name != AUTO:
            find(name)
        elif not is_here(MULTILINGUAL_EMBEDDER):
            find(DEFAULT_EMBEDDER)


def folder_of(documents: Path, include: Sequence[str] | None) -> Path:
    """Return the folder that is indexed: *documents*, or the one that this single file lies in.

    Raises:
        UsageError: patterns beside a single file.
    """
    if not documents.is_file():
        return documents
    if include:
        raise UsageError(f"include patterns choose from a folder, and {documents} is a file; leave them out")
    return documents.absolute().parent


def with_file(store: Store | None, file: Path) -> list[str]:
    """Return the patterns that a single file and those indexed before match; only ever files that were named.

    Raises:
        IndexFolderError: the index is of a whole folder, whose other documents would all be removed.
    """
    before = [] if store is None or store.is_new else store.patterns["include"]
    if store and not store.is_new and not (before and all(map(names_one_file, before))):
        raise IndexFolderError(
            f"{store.folder} is the index of the folder {source_folder(store)}; run `gistrag build "
            f"{source_folder(store)}`, or give {file.name} an --index of its own"
        )
    return [*before, *({only(file.name)} - {*before})]


def require_gists(store: Store, engine: Engine, made_with: Mapping[str, str], *, where: str) -> None:
    """Return if gists of the fingerprint *made_with* can stand beside those of an index, which are the engine's.

    Raises:
        FingerprintMismatchError: names what differs.
    """
    current = engine.gist_fingerprint(store.settings, made_with=made_with)
    if "making" in store.config.gist_fingerprint:
        current["making"] = store.config.gist_fingerprint["making"]
    remedy = "take an index of that model and these settings"
    require_same(
        {name: one for name, one in made_with.items() if name != "min_quality"}, current, where=where, remedy=remedy
    )


def are_of_index(store: Store, given: Mapping[str, str]) -> dict[str, bool]:
    """Return whether the model and the adapter, where *given* names them, are those the index was made with.

    Raises:
        ModelNotFoundError: nothing of that name.
    """
    settings, stored, found = located(store, given), store.config.gist_fingerprint, {}
    path = find(settings.model).path
    if "model" in given:
        folder = converted(path) if path.suffix == ".gguf" else path
        quantized = f" {settings.quantize}" if settings.quantize != "none" else ""
        current = recognized({"model": model_identity(folder) + quantized}, stored, folder)
        found["model"] = current["model"] == stored.get("model")
    if "adapter" in given:
        adapter = find_adapter(settings.adapter, path)
        found["adapter"] = (folder_sha256(adapter) if adapter else None) == stored.get("adapter")
    return found


def require_folder(folder: Path, index: Path) -> None:
    """Return if *folder* holds documents, and the index is not to lie right among them.

    Raises:
        UsageError: says which of the two.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UsageError(f"expected a folder of documents at {folder}, found {found}; check the path")
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UsageError(f"the name of {str(folder)!a} is not UTF-8, so no index can record it; rename it") from None
    with files.explained("look at", index):
        is_same = index.exists() and index.samefile(folder)
    if is_same:
        raise UsageError(f"expected another folder for the index than {folder}, found the same; name one with --index")


def require_source(store: Store, folder: Path) -> None:
    """Return if the index is of *folder*, or of a folder that has moved away.

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
    """Return the folder of documents of an index; recorded relative to the index, so that both can move."""
    return Path(os.path.normpath(store.folder / store.config.source))
