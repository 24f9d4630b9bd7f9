"""Chosen chunks as one adapter that peft loads on the base model: a CARTRIDGE.

peft's CARTRIDGE (Eyuboglu et al. 2025, arXiv 2506.06266) is a KV cache that stands before every prompt. peft knows no
gaps between its slots: behind *n* of them a prompt begins at position *n*. The gaps of a spread memory survive all the
same. A rotated key only knows its distance to who looks at it, so the whole memory is moved until it ends at *n*::

    here    prefix 0…P       first chunk P…P+n₁        second chunk …    question from P+n₁+n₂ on
    peft    prefix s…s+P     first chunk s+P…s+P+n₁    second chunk …    question from n on,   s = n - (P+n₁+n₂) ≤ 0

The logits are those of `gistrag.model.generation.generate` behind the same chunks, if the model that loads the
cartridge is the one that reads questions here: the base, with the adapter merged into it where there is one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gistrag.answering.answer import Usage
from gistrag.answering.assemble import Content, assemble, fitting_layout, span
from gistrag.answering.passages import load_gists
from gistrag.compression.compress import compress
from gistrag.errors import ContextOverflowError, ResourceError, UnsupportedModelError, UsageError
from gistrag.index.schema import StoredChunk
from gistrag.index.store import Store
from gistrag.kv.cache import GistCache, Memory
from gistrag.kv.packed import PackedGists
from gistrag.model.adapter import cartridge_files
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings, Layout
from gistrag.storage import files

logger = logging.getLogger("gistrag")

FACTS_FILE = "cartridge.json"
CARD_FILE = "README.md"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cartridge:
    """A memory of chosen chunks that ends where peft lets a prompt begin.

    Attributes:
        memory: prefix and chunks; ``next_position`` is the number of its slots.
        chunks: in the order of the memory; texts: ids of those that were read as text, which stand last; again: of
            those that were compressed again, because their heads keep different numbers of tokens.
        source_tokens: tokens the chunks have; layout: of the gists.
    """

    memory: Memory
    chunks: tuple[StoredChunk, ...]
    texts: tuple[int, ...]
    again: tuple[int, ...]
    source_tokens: int
    layout: Layout


def chosen(store: Store, ids: Iterable[int], scopes: Iterable[str]) -> list[StoredChunk]:
    """Return the chunks of whole documents, in their order, and then those of single numbers; none of them twice.

    Raises:
        UsageError: no such document or chunk, or none was named.
    """
    found: dict[int, StoredChunk] = {}
    for path in scopes:
        listed = store.chunks(sorted(store.select(None, path) or ()))
        found |= {chunk.id: chunk for chunk in sorted(listed, key=lambda chunk: chunk.ordinal)}
    for number in ids:
        if not (single := store.chunks([number])):
            raise UsageError(f"no chunk {number} in {store.folder}; gistrag inspect --document PATH lists them")
        found.setdefault(number, single[0])
    if not found:
        raise UsageError("no chunks; name some with --chunk, or a document with --scope")
    return list(found.values())


def cartridge_of(store: Store, model: GistModel, chunks: Sequence[StoredChunk]) -> Cartridge:
    """Return the chunks as one memory; those without a sound gist are read as text, behind the others.

    Spread if the window holds them so, packed else, as in an answer.

    A cartridge has the same slots for every head, and adaptive gists have not: their chunks are compressed again, as
    selected gists of the same number.

    Raises:
        ContextOverflowError: the window holds them in neither layout.
        UnsupportedModelError: layers of the model have windows, and peft counts their slots, not their positions.
    """
    if model.local_window is not None:
        raise UnsupportedModelError("expected a model whose layers all look at everything, found windows of "
                                    f"{model.local_window} positions, which a cartridge cannot keep")  # fmt: skip
    gists: dict[int, PackedGists | GistCache] = {**load_gists(chunks, store, Usage())}
    again = [chunk for chunk in chunks if chunk.id in gists and gists[chunk.id].is_ragged]
    gists |= _evened(model, again, store.settings.tokens_per_gist)
    texts = {chunk.id: model.encode_passage(chunk.text, chunk.heading) for chunk in chunks if chunk.id not in gists}
    caches = list(gists.values())
    contents: list[Content] = [*caches, *texts.values()]
    layout = _layout(model, contents)
    span_of_gists = sum(cache.span(layout) for cache in caches)
    memory = assemble(model, contents, layout=layout, start=sum(cache.gists for cache in caches) - span_of_gists)
    return Cartridge(
        memory=memory,
        chunks=tuple(sorted(chunks, key=lambda chunk: chunk.id in texts)),
        texts=tuple(texts),
        again=tuple(chunk.id for chunk in again),
        source_tokens=sum(cache.source_tokens for cache in caches) + sum(map(len, texts.values())),
        layout=layout,
    )


def _evened(model: GistModel, chunks: Sequence[StoredChunk], tokens_per_gist: int) -> dict[int, GistCache]:
    """Return selected gists of chunks by their ids; those of each head stand for the same number of tokens."""
    ids = [model.encode_passage(chunk.text, chunk.heading) for chunk in chunks]
    caches = compress(model, ids, GistSettings(placement="selected", tokens_per_gist=tokens_per_gist))
    return {chunk.id: cache for chunk, cache in zip(chunks, caches, strict=True)}


def _layout(model: GistModel, contents: Sequence[Content]) -> Layout:
    """Return the layout in which the context window holds the passages and at least one position more."""
    room = model.window - model.prefix.gists - 1
    layout = fitting_layout(contents, room)
    if (needed := sum(span(content, layout) for content in contents)) > room:
        raise ContextOverflowError(
            f"the chunks take {needed + model.prefix.gists} positions, the model's context window has {model.window}; "
            "choose fewer"
        )
    return layout


def save(cartridge: Cartridge, model: GistModel, folder: Path, *, name: str) -> dict[str, Any]:
    """Write the adapter into *folder*, private as gists are, and return the facts recorded there.

    Args:
        name: of the base model, as the index knows it.

    Raises:
        UsageError: there is something at *folder* already.
        ResourceError: the disk is too small.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"expected nothing or an empty folder at {folder}, found something; name another --output")
    needed, free = cartridge.memory.kv.nbytes, files.free_bytes(folder)
    if needed > free:
        raise ResourceError(f"the cartridge needs {needed:,} bytes, {folder} has {free:,} free; free some")
    base = model.weights if Path(name).expanduser().exists() else name  # not where the model lies on this machine
    facts = _facts(cartridge, model, base)
    written = cartridge_files(cartridge.memory.kv, base=base)
    written[FACTS_FILE] = (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()
    written[CARD_FILE] = _card(facts).encode()
    files.make_folder(folder)
    for file, data in written.items():
        files.write_atomic(folder / file, data)
    return facts


def _facts(cartridge: Cartridge, model: GistModel, base: str) -> dict[str, Any]:
    return {
        "base": base,
        "base_sha256": model.weights,
        "adapter": model.adapter.identity if model.adapter else None,
        "slots": cartridge.memory.slots,
        "source_tokens": cartridge.source_tokens,
        "layout": cartridge.layout,
        "before_question": f"{model.prompt.before_question} ",
        "after_question": model.prompt.after_question,
        "chunks": [
            {
                "chunk": chunk.id,
                "path": chunk.path,
                "page": chunk.page,
                "heading": list(chunk.heading),
                "start": chunk.start,
                "end": chunk.end,
                "as_text": chunk.id in cartridge.texts,
                "compressed_again": chunk.id in cartridge.again,
            }
            for chunk in cartridge.chunks
        ],
    }


def _card(facts: dict[str, Any]) -> str:
    """Return what a person who finds the folder must know."""
    places = "\n".join(f"- {chunk['path']}, characters {chunk['start']} to {chunk['end']}" for chunk in facts["chunks"])
    merged = (
        "\nQuestions were read with a gistrag adapter in the index this comes from. Merge that adapter into the base "
        f"model first\n(sha256 of its folder: `{facts['adapter']}`).\n"
        if facts["adapter"]
        else ""
    )
    return _CARD.format(**{**facts, "places": places, "merged": merged})


_CARD = """---
library_name: peft
tags: [cartridge, gistrag]
---
# {slots:,} slots that stand for {source_tokens:,} tokens

A CARTRIDGE adapter for peft, written by `gistrag export`: the KV cache of these passages, which stands before every
prompt.

{places}

It fits one base model only, `{base}`, whose weights have the sha256 `{base_sha256}`.
{merged}
The cache ends inside a prompt. Put the question between the two strings of `cartridge.json`:

```python
facts = json.load(open("cartridge.json"))
prompt = facts["before_question"] + question + facts["after_question"]
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
```

Keys and values can be turned back into text: this folder is as confidential as the passages.
"""
