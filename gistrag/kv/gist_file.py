"""A gist cache as the bytes of one safetensors file, and back, bit by bit the same unless it is quantized.

The file holds ``kv`` and ``positions`` and explains itself without the database: format, key, fingerprint, source
tokens, dtype and a seal over all of it. safetensors checks structure, not content, so `decode` compares the rest.
In a quantized file ``kv`` is what `gistrag.kv.quantization` made of it, with its scales beside it: near, and smaller.
A file of ragged heads stores no padding slots: ``counts`` says how many tokens each head keeps, and the heads stand
one behind the other. `gistrag.kv.packed` says what the arrays are.

It knows neither which file is recorded nor where it belongs; that is `gistrag.index.gist_store`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from gistrag.errors import CorruptGistError, GistNotFoundError
from gistrag.kv.packed import Array, PackedGists
from gistrag.storage import files

FORMAT_VERSION, QUANTIZED_VERSION, RAGGED_VERSION = "1", "2", "3"
READERS = 4
"""Gist files that are read at a time."""
FLOATS = ("bfloat16", "float16", "float32", "float64")
_TYPES = {  # of safetensors: what numpy reads it as, and what it is called in a seal
    **{"BF16": ("<u2", "bfloat16"), "F16": ("<f2", "float16"), "F32": ("<f4", "float32"), "F64": ("<f8", "float64")},
    **{"I8": ("i1", "int8"), "U8": ("u1", "uint8"), "I16": ("<i2", "int16"), "I32": ("<i4", "int32")},
}


One = TypeVar("One")
Loaded = TypeVar("Loaded")


class Packable(Protocol):
    """A gist cache that can be packed, see `gistrag.kv.cache.GistCache`."""

    def packed(self, kv_cache_dtype: str) -> PackedGists:
        """Return it as its file holds it."""


def read(path: Path, *, bytes_max: int | None = None) -> tuple[bytes, files.Stamp]:
    """Return the bytes of a gist file and the stamp it had.

    Raises:
        GistNotFoundError: no such file.
        CorruptGistError: the system cannot read it, or it holds more than *bytes_max*.
    """
    try:
        return files.read_stamped(path, bytes_max=bytes_max)
    except FileNotFoundError:
        raise GistNotFoundError(f"no file {path}; run gistrag build to make it") from None
    except (OSError, MemoryError) as error:
        if files.is_shortage(error):
            raise CorruptGistError(f"{path} cannot be read now: {files.shortage(error)}") from error
        raise corrupt(path, "a readable file", getattr(error, "strerror", "") or type(error).__name__) from error


def encode(cache: Packable, *, key: str, fingerprint: str, kv_cache_dtype: str = "auto") -> bytes:
    """Return *cache* as a file that explains itself.

    Args:
        kv_cache_dtype: ``auto`` for keys and values as they are, ``int8`` or ``int4``.

    Raises:
        CorruptGistError: a cache of another shape or dtype than a gist cache has.
    """
    gists = cache.packed(kv_cache_dtype)
    if problem := _misshapen(gists):
        raise CorruptGistError(f"a gist cache that cannot be stored: {problem}")
    metadata = {
        "format": _version(gists),
        "key": key,
        "fingerprint": fingerprint,
        "source_tokens": str(gists.source_tokens),
        "dtype": f"torch.{gists.dtype}",
    }
    data = safetensors.numpy.save(dict(gists.arrays), {**metadata, "sha256": _seal(gists, metadata)})
    return _finished(data, [name for name, array in gists.arrays.items() if array.dtype == np.uint16])


def _finished(data: bytes, bfloat16: Sequence[str]) -> bytes:
    """Return a safetensors file with its header sorted: the same gist is the same bytes, also when made again.

    Args:
        bfloat16: tensors of this type, which numpy wrote as whole numbers.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    parts = json.loads(data[8:end])
    for name in bfloat16:
        parts[name]["dtype"] = "BF16"
    header = json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def decode(data: bytes, path: Path, *, key: str, fingerprint: str, check_seal: bool = False) -> PackedGists:
    """Return the gists in *data*.

    Raises:
        CorruptGistError: not a gist file, or not that of *key* by the model of *fingerprint*.
    """
    try:
        parts: Any = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        arrays = {name: _array(**part) for name, part in parts}
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        seal = metadata.pop("sha256")
        gists = PackedGists(arrays, int(metadata["source_tokens"]), metadata["dtype"].removeprefix("torch."))
        problem = _misshapen(gists)
        version = _version(gists)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise corrupt(path, "a gist file", f"{type(error).__name__}: {error}") from error
    identity = {"format": version, "key": key, "fingerprint": fingerprint}
    for name, expected in identity.items():
        if (found := metadata.get(name)) != expected:
            raise corrupt(path, f"{name} {expected}", str(found))
    if problem:
        raise corrupt(path, "a gist cache", problem)
    if check_seal and seal != _seal(gists, metadata):
        raise corrupt(path, f"content of sha256 {seal}", "another")
    return gists


def _array(*, dtype: str, shape: list[int], data: bytearray) -> Array:
    """Return a tensor of a safetensors file.

    Raises:
        KeyError: of a type that no gist file has.
    """
    return np.frombuffer(data, _TYPES[dtype][0]).reshape(shape)


def _type_name(name: str, array: Array, dtype: str) -> str:
    """Return what safetensors and torch call the type of an array of a cache of *dtype*."""
    if name == "key_centres" or (name == "kv" and dtype == "bfloat16" and array.dtype == np.uint16):
        return "bfloat16"
    return array.dtype.name


def _version(gists: PackedGists) -> str:
    if gists.is_ragged:
        return RAGGED_VERSION
    return QUANTIZED_VERSION if gists.is_quantized else FORMAT_VERSION


def _seal(gists: PackedGists, metadata: Mapping[str, str]) -> str:
    """Return the sha256 of what a gist file says, for one that no row vouches for."""
    seal = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, array in sorted(gists.arrays.items()):
        seal.update(f"{name} torch.{_type_name(name, array, gists.dtype)} {array.shape} ".encode())
        seal.update(array.tobytes())
    return seal.hexdigest()


def _misshapen(gists: PackedGists) -> str:
    """Return what is wrong with the arrays of a gist cache; nothing for a sound one.

    Raises:
        KeyError: an array is missing.
    """
    kv, positions = gists.arrays["kv"], gists.arrays["positions"]
    if gists.dtype not in FLOATS:
        return f"dtype {gists.dtype}"
    if gists.is_ragged:
        counts, kept = gists.counts, len(positions)
        if counts.ndim != 2 or not counts.size or int(counts.min()) < 1 or int(counts.sum()) != kept:
            return f"{counts.shape} counts for {kept} positions"
        expected: tuple[tuple[int, ...], ...] = ((kept,),)
        if kv.ndim != 3 or kv.shape[:2] != (kept, 2):
            return f"kv is {kv.shape}, expected ({kept}, 2, head_dim)"
    else:
        if kv.ndim != 5 or kv.shape[1] != 2 or not kv.size:
            return f"kv is {kv.shape}, expected (layers, 2, kv_heads, gists, head_dim)"
        expected = ((kv.shape[3],), (kv.shape[0], *kv.shape[2:4]))
    if positions.shape not in expected:
        return f"positions are {positions.shape} for kv {kv.shape}"
    if int(positions.min()) < 0 or int(positions.max()) >= gists.source_tokens:
        return f"positions {int(positions.min())} to {int(positions.max())} in {gists.source_tokens} tokens"
    return _misquantized(gists, kv)


def _misquantized(gists: PackedGists, kv: Array) -> str:
    """Return what is wrong with the numbers of a gist cache and their scales; nothing where all is right."""
    found = kv.dtype.name
    if not gists.is_quantized:
        expected = "uint16" if gists.dtype == "bfloat16" else gists.dtype
        return "" if found == expected else f"kv of {found} for a cache of {gists.dtype}"
    if found not in ("int8", "uint8"):
        return f"keys and values of {found}, expected 8 or 4 bits"
    head_dim = kv.shape[-1] * (1 if found == "int8" else 2)
    tokens = kv.shape[:1] if gists.is_ragged else (kv.shape[0], *kv.shape[2:4])
    shapes = {"key_scales": (*gists.counts.shape, head_dim), "value_scales": tokens}
    for name, shape in shapes.items():
        scales = gists.arrays[name]
        if scales.shape != shape or scales.dtype != np.uint8:
            return f"{name} are {scales.shape} of {scales.dtype}, expected {shape} of uint8"
    return "" if found == "int8" or gists.arrays["key_centres"].shape == shapes["key_scales"] else "other key_centres"


def in_parallel(load: Callable[[One], Loaded], wanted: Sequence[One]) -> list[Loaded]:
    """Return what *load* makes of each, several files at a time: reading and hashing leave other threads free."""
    with ThreadPoolExecutor(min(READERS, len(wanted) or 1)) as readers:
        return list(readers.map(load, wanted))


def corrupt(path: Path, expected: str, found: str) -> CorruptGistError:
    """Return the error for a file that is not what it should be."""
    return CorruptGistError(f"{path}: expected {expected}, found {found}; run gistrag build to make it again")
