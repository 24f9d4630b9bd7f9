"""A gist cache as the bytes of one safetensors file, and back, bit by bit the same unless it is quantized.

The file holds ``kv`` and ``positions`` and explains itself without the database: format, key, fingerprint, source
tokens, dtype and a seal over all of it. safetensors checks structure, not content, so `decode` compares the rest.
In a quantized file ``kv`` is what `gistrag.kv.quantization` made of it, with its scales beside it: near, and smaller.
A file of ragged heads stores no padding slots: ``counts`` says how many tokens each head keeps, and the heads stand
one behind the other.

It knows neither which file is recorded nor where it belongs; that is `gistrag.index.gist_store`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gistrag.errors import CorruptGistError, GistNotFoundError
from gistrag.kv import quantization
from gistrag.kv.cache import GistCache
from gistrag.storage import files

FORMAT_VERSION, QUANTIZED_VERSION, RAGGED_VERSION = "1", "2", "3"
DTYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}


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
        raise corrupt(path, "a readable file", getattr(error, "strerror", "") or type(error).__name__) from error


def encode(cache: GistCache, *, key: str, fingerprint: str, kv_cache_dtype: str = "auto") -> bytes:
    """Return *cache* as a file that explains itself; positions in 16 bits where they fit.

    Args:
        kv_cache_dtype: ``auto`` for keys and values as they are, ``int8`` or ``int4``.
    """
    if problem := _misshapen(cache):
        raise CorruptGistError(f"a gist cache that cannot be stored: {problem}")
    bits, kv = quantization.BITS.get(kv_cache_dtype), cache.kv.detach().cpu()
    small = torch.int16 if cache.source_tokens <= torch.iinfo(torch.int16).max else torch.int32
    tensors = quantization.quantize(kv, bits) if bits else {"kv": kv}
    tensors["positions"] = cache.positions.cpu().to(small)
    is_ragged = cache.is_ragged
    if is_ragged:
        tensors = _without_padding(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": _version(is_ragged=is_ragged, is_plain=not bits),
        "key": key,
        "fingerprint": fingerprint,
        "source_tokens": str(cache.source_tokens),
        "dtype": str(cache.kv.dtype),
    }
    return _ordered(safetensors.torch.save(tensors, {**metadata, "sha256": _seal(tensors, metadata)}))


def _ordered(data: bytes) -> bytes:
    """Return a safetensors file with its header sorted: the same gist is the same bytes, also when made again."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    return data[:8] + header.ljust(end - 8) + data[end:]


def decode(data: bytes, path: Path, *, key: str, fingerprint: str, check_seal: bool = False) -> GistCache:
    """Return the cache in *data*.

    Raises:
        CorruptGistError: not a gist file, or not that of *key* by the model of *fingerprint*.
    """
    try:
        tensors = safetensors.torch.load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        seal = metadata.pop("sha256")
        is_plain = tensors["kv"].is_floating_point()
        kv, positions, counts = tensors["kv"], tensors["positions"].long(), _counts(tensors)
        if not is_plain:
            kv = quantization.dequantize(tensors, DTYPES[metadata["dtype"]], counts=counts)
        if counts is not None:  # only now, because padding slots would be most of the work
            kv, positions = _with_padding(kv, positions, counts)
        cache = GistCache(kv, positions, int(metadata["source_tokens"]))
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise corrupt(path, "a gist file", f"{type(error).__name__}: {error}") from error
    version = _version(is_ragged=counts is not None, is_plain=is_plain)
    identity = {"format": version, "key": key, "fingerprint": fingerprint, "dtype": str(cache.kv.dtype)}
    for name, expected in identity.items():
        if (found := metadata.get(name)) != expected:
            raise corrupt(path, f"{name} {expected}", str(found))
    if problem := _misshapen(cache):
        raise corrupt(path, "a gist cache", problem)
    if check_seal and seal != _seal(tensors, metadata):
        raise corrupt(path, f"content of sha256 {seal}", "another")
    return cache


def _version(*, is_ragged: bool, is_plain: bool) -> str:
    if is_ragged:
        return RAGGED_VERSION
    return FORMAT_VERSION if is_plain else QUANTIZED_VERSION


_BY_SLOT = ("positions", "value_scales")


def _without_padding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a cache with all that is kept in one row, ``(kept, …)``, and how much each head keeps."""
    kept = tensors["positions"] >= 0  # (layers, kv_heads, slots)
    rows = {name: tensors[name][kept] for name in _BY_SLOT if name in tensors}
    kv = tensors["kv"].permute(0, 2, 3, 1, 4)[kept]  # (kept, 2, head_dim)
    return {**tensors, **rows, "kv": kv, "counts": kept.sum(dim=-1).to(torch.int32)}


def _counts(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return how much each head keeps, ``(layers, kv_heads)``; None where all keep the same.

    Raises:
        ValueError: the counts are not those of what is kept.
    """
    if "counts" not in tensors:
        return None
    counts, kept = tensors["counts"].long(), len(tensors["positions"])
    if counts.ndim != 2 or int(counts.min()) < 1 or int(counts.sum()) != kept:
        raise ValueError(f"{tuple(counts.shape)} counts for {kept} positions")
    return counts


def _with_padding(kv: Tensor, positions: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_without_padding` took; a padding slot repeats the first token of its head."""
    ends = counts.flatten().cumsum(0).view_as(counts)[..., None]  # (layers, kv_heads, 1)
    slots = torch.arange(int(counts.max()))
    is_padding = slots >= counts[..., None]  # (layers, kv_heads, slots)
    index = ends - counts[..., None] + slots.masked_fill(is_padding, 0)
    return kv[index].permute(0, 3, 1, 2, 4), positions[index].masked_fill(is_padding, -1)


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the sha256 of what a gist file says, for one that no row vouches for."""
    seal = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        seal.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        seal.update(tensors[name].view(torch.uint8).numpy().data)
    return seal.hexdigest()


def _misshapen(cache: GistCache) -> str:
    """Return what is wrong with the shapes of a cache; nothing for a sound one."""
    kv, positions = cache.kv, cache.positions
    if kv.ndim != 5 or kv.shape[1] != 2 or not kv.numel() or not kv.is_floating_point():
        return f"kv is {tuple(kv.shape)} of {kv.dtype}, expected (layers, 2, kv_heads, gists, head_dim)"
    layers, _, kv_heads, gists, _ = kv.shape
    if tuple(positions.shape) not in {(gists,), (layers, kv_heads, gists)}:
        return f"positions are {tuple(positions.shape)} for kv {tuple(kv.shape)}"
    least = -1 if positions.ndim == 3 and not bool((positions[..., 0] < 0).any()) else 0  # no head is all padding
    if int(positions.min()) < least or int(positions.max()) >= cache.source_tokens:
        return f"positions {int(positions.min())} to {int(positions.max())} in {cache.source_tokens} tokens"
    return ""


def corrupt(path: Path, expected: str, found: str) -> CorruptGistError:
    """Return the error for a file that is not what it should be."""
    return CorruptGistError(f"{path}: expected {expected}, found {found}; run gistrag build to make it again")
