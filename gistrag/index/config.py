"""What an index was made with, as recorded in it: settings, source folder, fingerprints of the models, and a salt."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gistrag.errors import IndexFolderError, UsageError
from gistrag.index.database import Database, nothing_built
from gistrag.settings import GistSettings, IndexSettings
from gistrag.storage.fingerprint import digest

NAME = "config"
PLACES = ("model", "embedder", "adapter")
"""Settings that may be paths; these are recorded relative to the folder of the index, so that all can move together."""


@dataclass(frozen=True)
class IndexConfig:
    """What the index in *folder* was made with; *values* is empty until a builder configures it.

    A store keeps the one it was opened with, even if a builder changes the index meanwhile.
    """

    folder: Path
    values: Mapping[str, str]

    @classmethod
    def read(cls, database: Database) -> IndexConfig:
        """Return what is recorded.

        Raises:
            IndexFolderError: it was changed since.
        """
        return cls(database.folder, database.get_sealed(NAME))

    def write(
        self,
        database: Database,
        settings: IndexSettings,
        *,
        source: str,
        gist_fingerprint: Mapping[str, str],
        embedder_fingerprint: Mapping[str, str],
    ) -> IndexConfig:
        """Record other values than these, from the next commit on, and return them; the salt stays."""
        values = {
            "settings": replace(settings, **_moved(settings, lambda name: _relative(name, self.folder))).to_json(),
            "source": source,
            "gist_fingerprint": json.dumps(dict(gist_fingerprint), sort_keys=True),
            "embedder_fingerprint": json.dumps(dict(embedder_fingerprint), sort_keys=True),
            "salt": self.values.get("salt") or secrets.token_hex(16),
        }
        database.set_sealed(NAME, values)
        return IndexConfig(self.folder, values)

    @cached_property
    def settings(self) -> IndexSettings:
        """The settings the index is made with.

        Raises:
            IndexFolderError: they hold something this version does not know.
        """
        try:
            stored = IndexSettings.from_json(self._get("settings"))
            return replace(stored, **_moved(stored, lambda name: _absolute(name, self.folder)))
        except (TypeError, UsageError) as error:
            raise IndexFolderError(
                f"{self.folder} was made by another version of gistrag, its settings are not understood ({error}); "
                "upgrade gistrag, or build into another folder"
            ) from error

    @property
    def gists(self) -> GistSettings:
        """How chunks become gist caches, by the version that the index was made with."""
        making = self.gist_fingerprint.get("making")
        return replace(self.settings.gists, making=int(making) if making else None)

    @property
    def source(self) -> str:
        """The folder of documents, relative to the folder of the index."""
        return self._get("source")

    @property
    def salt(self) -> str:
        """Random text in every key, so that two indexes never share one."""
        return self._get("salt")

    @property
    def gist_fingerprint(self) -> dict[str, str]:
        """All that a gist depends on."""
        return _parts(self._get("gist_fingerprint"))

    @property
    def embedder_fingerprint(self) -> dict[str, str]:
        """All that a vector depends on."""
        return _parts(self._get("embedder_fingerprint"))

    @cached_property
    def gists_by(self) -> str:
        """Hash of the gist fingerprint, recorded with every document and in every gist file."""
        return digest(_parts(self.values.get("gist_fingerprint", "{}")))

    @cached_property
    def vectors_by(self) -> str:
        """Hash of the embedder's fingerprint, recorded with every document."""
        return digest(_parts(self.values.get("embedder_fingerprint", "{}")))

    def _get(self, name: str) -> str:
        if not self.values:
            raise nothing_built(self.folder)
        return self.values[name]


def is_path(name: str) -> bool:
    """Return whether the name of a model is the absolute path that a recorded place is read as."""
    return Path(name).is_absolute()


def _moved(settings: IndexSettings, move: Callable[[str], str]) -> dict[str, Any]:
    return {name: move(getattr(settings, name)) for name in PLACES}


def _relative(name: str, folder: Path) -> str:
    """Return an absolute path as seen from *folder*, beginning with a dot; any other name as it is.

    >>> _relative("/models/tiny", Path("/home/index")), _relative("org/tiny", Path("/home/index"))
    ('../../models/tiny', 'org/tiny')
    """
    if not is_path(name):
        return name
    try:
        found = Path(os.path.relpath(name, folder)).as_posix()
    except ValueError:  # on another drive
        return name
    return found if found.startswith("../") else f"./{found}"


def _absolute(name: str, folder: Path) -> str:
    """Return where a recorded path leads from *folder*; up to version 0.2 it led from the working folder of a build."""
    if not name.startswith(("./", "../")):
        return name
    found = os.path.normpath(folder / name)
    return name if Path(name).exists() and not Path(found).exists() else found


def _parts(line: str) -> dict[str, str]:
    parts: dict[str, str] = json.loads(line)
    return parts
