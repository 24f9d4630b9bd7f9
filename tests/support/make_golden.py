"""A small index of the current format, and a gist file of each form there is, to be opened for ever after.

    python -m support.make_golden                    run in tests/, makes what is missing of data/golden-*/

They were made once, with the fake compressor and a random model of 45,000 parameters, and never again: the test of
a later version reads the files of the earlier one. Beside them lies what is in them, in ``expected.json``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from support import fake_compressor
from support.small_index import vectors_of

from gistrag.index.schema import FORMAT_VERSION
from gistrag.index.store import Store
from gistrag.kv.cache import GistCache
from gistrag.kv.gist_file import decode, encode
from gistrag.rag import GistRAG

DATA = Path(__file__).parents[1] / "data"
DOCUMENTS = {
    "mill.md": "# The mill\n\nThe mill grinds rye from Monday to Friday.\n\n## Prices\n\nA sack costs nine coins.\n",
    "harbour.txt": "The harbour of Lund has three cranes. The oldest is red, the youngest is blue.",
    "short.txt": "Salt.",
}


def contents(index: Path) -> dict[str, Any]:
    """Return what is in an index, its numbers as hashes."""
    with Store.open(index) as store, store.snapshot():
        return {
            "documents": [[row.path, row.sha256, row.kind, row.chunks, row.tokens] for row in store.documents()],
            "chunks": [_chunk(store, chunk) for row in store.documents() for chunk in store.chunks_of(row.path)],
            "skipped": [[row.path, row.reason] for row in store.skipped()],
            "cranes": store.keyword_search(["cranes"], 3)[0][0],
            "settings": json.loads(store.settings.to_json()),
            "fingerprints": [store.config.gist_fingerprint, store.config.embedder_fingerprint],
            "patterns": store.patterns,
        }


def _chunk(store: Store, chunk: Any) -> dict[str, Any]:
    cache = GistCache.unpacked(store.gists.load(chunk.gist_key)) if chunk.gist_key else None
    return {
        "id": chunk.id,
        "place": [chunk.path, chunk.ordinal, chunk.start, chunk.end, list(chunk.heading), chunk.page],
        "text": chunk.text,
        "gist": cache and [hashlib.sha256(cache.kv.numpy().tobytes()).hexdigest(), cache.positions.tolist()],
        "vectors": hashlib.sha256(vectors_of(store, chunk.id).tobytes()).hexdigest(),
    }


def make(target: Path) -> None:
    """Make the golden index of the current format."""
    with tempfile.TemporaryDirectory() as folder, fake_compressor.fake_compression():
        docs, index = Path(folder, "docs"), Path(folder, "index")
        docs.mkdir()
        for name, text in DOCUMENTS.items():
            (docs / name).write_text(text, "utf-8")
        (docs / "scan.txt").write_bytes(b"\0\1\2")
        settings = {"chunk_tokens": 96, "tokens_per_gist": fake_compressor.TOKENS_PER_GIST}
        GistRAG.from_folder(docs, index=index, engine=fake_compressor.engine(), gists="now", **settings).close()
        unneeded = shutil.ignore_patterns("lock", "*-wal", "*-shm")  # the lock holds the name of a machine
        shutil.copytree(index, target, ignore=unneeded)
        (target / "expected.json").write_text(json.dumps(contents(index), indent=1) + "\n", "utf-8")


GISTS = DATA / "golden-gists"
KEY, FINGERPRINT = "ab" * 32, "golden"
FORMS: dict[str, tuple[str, bool]] = {
    "plain": ("auto", False),
    "int8": ("int8", False),
    "int4": ("int4", False),
    "ragged": ("auto", True),
    "ragged-int8": ("int8", True),
    "ragged-int4": ("int4", True),
}
"""By name: how keys and values are stored, and whether heads keep different numbers of tokens."""


def gist(*, is_ragged: bool) -> GistCache:
    """Return a small cache in bfloat16, as a model makes them."""
    kv = torch.randn(2, 2, 2, 3, 8, generator=torch.Generator().manual_seed(14)).to(torch.bfloat16)
    positions = (
        torch.tensor([[[0, 4, 9], [1, 2, 8]], [[3, -1, -1], [0, 7, -1]]]) if is_ragged else torch.tensor([0, 4, 9])
    )
    return GistCache(kv, positions, 10)


def found_in(data: bytes, name: str) -> dict[str, Any]:
    """Return what a gist file holds, its numbers as a hash."""
    cache = GistCache.unpacked(decode(data, Path(name), key=KEY, fingerprint=FINGERPRINT, check_seal=True))
    seen = torch.where(cache.visible[:, None, :, :, None], cache.kv, 0).float()  # what stands in holes does not count
    told = hashlib.sha256(seen.numpy().tobytes()).hexdigest()
    return {
        "kv": told,
        "positions": cache.positions.tolist(),
        "tokens": cache.source_tokens,
        "dtype": str(cache.kv.dtype),
    }


def make_gists(target: Path) -> None:
    """Make the golden gist files that are missing."""
    target.mkdir(exist_ok=True)
    record = target / "expected.json"
    expected = json.loads(record.read_text("utf-8")) if record.exists() else {}
    for name, (kv_cache_dtype, is_ragged) in FORMS.items():
        path = target / f"{name}.safetensors"
        if not path.exists():
            cache = gist(is_ragged=is_ragged)
            path.write_bytes(encode(cache, key=KEY, fingerprint=FINGERPRINT, kv_cache_dtype=kv_cache_dtype))
            expected[name] = found_in(path.read_bytes(), name)
    record.write_text(json.dumps(expected, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    make_gists(GISTS)
    if not (index := DATA / f"golden-index-{FORMAT_VERSION}").exists():
        make(index)
