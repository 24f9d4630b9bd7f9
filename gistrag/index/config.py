"""What an index was made with, as recorded in it: settings, source folder, fingerprints of the models, and a salt."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from gistrag.errors import IndexFolderError, UsageError
from gistrag.index.database import Database, nothing_built
from gistrag.settings import GistSettings, IndexSettings
from gistrag.storage.fingerprint import digest

NAME = "config"


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
            "settings": settings.to_json(),
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
            return IndexSettings.from_json(self._get("settings"))
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


def _parts(line: str) -> dict[str, str]:
    parts: dict[str, str] = json.loads(line)
    return parts
