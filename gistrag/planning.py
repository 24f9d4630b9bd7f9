"""What a build of a folder would do: `plan_build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gistrag.configure import (
    folder_of,
    fresh,
    inherited,
    require_engine,
    require_folder,
    require_source,
    with_embedder,
    with_file,
)
from gistrag.documents.patterns import require_patterns
from gistrag.engine import Engine
from gistrag.errors import IncompleteIndexError
from gistrag.index.plan import Plan, planned
from gistrag.index.store import Store
from gistrag.model.runtime import AnyRuntime
from gistrag.settings import IndexSettings


def plan_build(
    documents: Path,
    index: Path,
    settings: Mapping[str, Any],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    delete: bool = True,
    prune: bool = False,
    rebuild: bool = False,
    engine: Engine | None = None,
) -> tuple[Plan, AnyRuntime]:
    """Return what a build with the same arguments would do, and the runtime that counted its tokens.

    Models are loaded to tell; nothing of the index is made or changed.

    Args:
        settings: fields of `IndexSettings`; None inherits the value of the index.

    Raises:
        UsageError, FingerprintMismatchError, IndexFolderError: as the build would.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    folder = folder_of(documents, include)
    require_folder(folder, index)
    require_patterns(include, exclude)
    with _opened(index) or nullcontext() as store:
        given = with_embedder(store, given, documents, engine=engine, rebuild=rebuild, include=include, exclude=exclude)
        wanted = inherited(store, given, rebuild=rebuild, engine=engine) if store else fresh(given, engine)
        if store:
            require_source(store, folder)
        engine = engine or Engine.load(wanted)
        is_other = bool(store and _is_other(store, engine, wanted, rebuild=rebuild))
        plan = planned(
            folder,
            store,
            runtime=engine.runtime,
            settings=wanted,
            include=with_file(store, documents) if documents.is_file() else include,
            exclude=exclude,
            delete=delete,
            prune=prune,
            make_again=is_other,
        )
    return plan, engine.runtime


def _opened(index: Path) -> Store | None:
    try:
        return Store.open(index)
    except IncompleteIndexError:
        return None


def _is_other(store: Store, engine: Engine, wanted: IndexSettings, *, rebuild: bool) -> bool:
    """Return whether a rebuild makes everything again.

    Raises:
        FingerprintMismatchError: the models are others, and no rebuild is asked for.
    """
    if not rebuild:
        require_engine(store, engine)
        return False
    config = store.config
    return (config.gist_fingerprint, config.embedder_fingerprint) != (
        engine.gist_fingerprint(wanted),
        engine.embedder.fingerprint,
    )
