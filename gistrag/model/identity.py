"""What a model is: its weights, its tokenizer and its geometry, whatever library wrote its files.

The identity of a model is one hash over the numbers of its tensors, over the fields of its configuration that change
what it computes, and over its tokenizer. The version of a library, the order of a file and the dtype that a machine
computes in do not count, so the same model has the same identity on every machine.

Up to version 0.2 an index recorded a hash over whole files instead, ``transformers_version`` among them. `recognized`
takes such a record for what it is if the files here, as some release of transformers wrote them, have that hash.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from gistrag.errors import ModelNotFoundError
from gistrag.model.hashing import file_hashes, joined_sha256, remembered

FORM = "v2:"
"""Begins every identity, and no hash over whole files."""
_NEUTRAL = re.compile(  # fields of a configuration that change no number of a cache
    r"_.*|transformers_version|architectures|(torch_)?dtype|use_cache|(bos|eos|pad|unk|sep|cls|mask)_token_id|"
    r"initializer_range|pretraining_tp|gradient_checkpointing|.*dropout(_prob)?|id2label|label2id"
)
_TOKENIZING = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
"""Parts of a tokenizer.json that decide what becomes which token."""
_VOCABULARIES = ("tokenizer.model", "vocab.txt", "vocab.json", "merges.txt")
_WHOLE_FILES = re.compile(r"[0-9a-f]{64}( |$)")
_VERSION = re.compile(rb'("transformers_version": ")[^"]*')
_BLOCK_BYTES = 2**22
_HEADER_BYTES_MAX = 100_000_000  # of safetensors itself


def model_identity(folder: Path) -> str:
    """Return the identity of the model in *folder*: ``v2:`` and 64 hex digits.

    Raises:
        ModelNotFoundError: no readable safetensors weights or configuration in it.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelNotFoundError(f"expected *.safetensors weights in {folder}, found none; convert the model first")
    try:
        tensors = [line for path in weights for line in remembered(path, "tensors", _tensors)]
        parts = [*sorted(tensors), *_configurations(folder), *_tokenizer(folder)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelNotFoundError(f"the model in {folder} cannot be read: {type(error).__name__}: {error}") from error
    return FORM + _sha256("\n".join(parts))


def recognized(
    current: Mapping[str, str], stored: Mapping[str, str] | None, folder: Path | None, *, part: str = "model"
) -> dict[str, str]:
    """Return the fingerprint *current*, in the words of *stored* where version 0.2 recorded the same model there.

    Args:
        stored: fingerprint of an index, None for a new one.
        folder: of the model as safetensors, None for one that came from no folder.
        part: the part of both that names the model.
    """
    recorded = (stored or {}).get(part, "")
    if stored is None or folder is None or recorded == current[part] or not _WHOLE_FILES.match(recorded):
        return dict(current)
    sha256, _, quantized = recorded.partition(" ")
    if quantized != current[part].partition(" ")[2] or sha256 not in _whole_files(folder):
        return dict(current)
    kept = {name: stored[name] for name in (part, "rope") if name in stored}  # the files decide the angles
    return {**current, **kept}


def _whole_files(folder: Path) -> Iterator[str]:
    """Yield the hashes that version 0.2 gave this folder, as each release of transformers 5 would have written it."""
    hashes, config = file_hashes(folder), (folder / "config.json").read_bytes()
    yield joined_sha256(hashes)
    if _VERSION.search(config):
        for minor, patch in product(range(100), range(10)):
            written = _VERSION.sub(rb"\g<1>" + f"5.{minor}.{patch}".encode(), config)
            yield joined_sha256({**hashes, "config.json": _sha256(written)})


def _tensors(path: Path) -> list[str]:
    """Return a line for each tensor of a safetensors file: name, dtype, shape and the hash of its numbers."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, _HEADER_BYTES_MAX)))
        header.pop("__metadata__", None)
        lines = []
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = tensor["data_offsets"]
            file.seek(8 + length + begin)
            lines.append(f"{name} {tensor['dtype']} {tensor['shape']} {_sha256_of(file, end - begin)}")
    return lines


def _sha256_of(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        digest.update(block)
        size -= len(block)
    if size:
        raise ValueError(f"a tensor ends {size:,} bytes early")
    return digest.hexdigest()


def _configurations(folder: Path) -> Iterator[str]:
    """Yield what the configuration says, and that of the modules around an embedder."""
    names = ("config.json", "modules.json", "sentence_bert_config.json")
    for path in (*(folder / name for name in names), *sorted(folder.glob("*_Pooling/config.json"))):
        if path.exists() or path.name == names[0]:
            values = json.loads(path.read_text("utf-8"))
            yield f"{path.relative_to(folder).as_posix()} {_canonical(_geometry(values))}"


def _geometry(values: Any) -> Any:
    """Return a configuration without what changes no number, its RoPE in the form of transformers 5."""
    if not isinstance(values, dict):
        return values
    kept = {name: value for name, value in values.items() if not _NEUTRAL.fullmatch(name)}
    scaling, theta = kept.pop("rope_scaling", None), kept.pop("rope_theta", None)
    if scaling or theta:
        old = {"rope_type": "default", "rope_theta": theta, **(scaling or {})}
        kept["rope_parameters"] = {**old, **(kept.get("rope_parameters") or {})}
    return kept


def _tokenizer(folder: Path) -> list[str]:
    """Return what the tokenizer of a folder makes of text."""
    if (path := folder / "tokenizer.json").exists():
        return [f"tokenizer {remembered(path, 'tokenizer', _tokenizer_sha256)}"]
    vocabularies = (folder / name for name in _VOCABULARIES)
    return [f"{path.name} {_sha256(path.read_bytes())}" for path in vocabularies if path.exists()]


def _tokenizer_sha256(path: Path) -> str:
    values = json.loads(path.read_text("utf-8"))
    kept = {name: values.get(name) for name in _TOKENIZING}
    merges = (kept["model"] or {}).get("merges") or []  # pairs, or both parts in one line
    kept["model"] = {
        **(kept["model"] or {}),
        "merges": [one if isinstance(one, str) else " ".join(one) for one in merges],
    }
    return _sha256(_canonical(kept))


def _canonical(value: Any) -> str:
    """Return a value as JSON with sorted keys; what is absent, null, false or empty reads the same.

    >>> _canonical({"b": None, "a": [1, {"c": False}]}) == _canonical({"a": [1, {}]})
    True
    """
    return json.dumps(_filled(value), sort_keys=True)


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(one) for key, one in value.items() if one is not None and one is not False and one != ""}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _sha256(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
