"""What peft computes with an exported cartridge is what this library computes behind the same chunks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from support.tiny_models import ExactRotary, HashEmbedder, byte_tokenizer, tiny_model, tiny_network

from gistrag import export, rag
from gistrag.cli.main import main as run_command
from gistrag.compression.compress import compress
from gistrag.engine import Engine
from gistrag.errors import ContextOverflowError, UnsupportedModelError, UsageError
from gistrag.kv.cache import GistCache, concatenate
from gistrag.model.generation import generate, read_text
from gistrag.model.gist_model import GistModel
from gistrag.rag import GistRAG
from gistrag.settings import GistSettings

QUESTION = "What does the mill grind?"
TEXTS = {
    "bees.md": "# Bees\n\nBees gather nectar in spring and keep the honey in combs of wax for winter.",
    "mills.md": "# Mills\n\nThe mill stands by the river and grinds the wheat of the whole valley. " * 3,
    "note.txt": "S",
}
# peft keeps the cache in float32 (7 digits); three layers of a random model make of that some 1e-6 in the logits
EQUAL = {"rtol": 0, "atol": 2e-5}


def index(tmp_path: Path, model: GistModel, **settings: Any) -> GistRAG:
    """Return an index of three documents; `S` is too short for gists."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in TEXTS.items():
        (docs / name).write_text(text, "utf-8")
    dials = {"placement": "selected", "tokens_per_gist": 6, "chunk_tokens": 96, **settings}
    return GistRAG.from_folder(
        docs, index=tmp_path / "index", engine=Engine(model, HashEmbedder()), gists="now", **dials
    )


def exported(made: GistRAG, folder: Path, *scopes: str) -> export.Cartridge:
    """Write the chunks of documents into *folder* and return them as one memory."""
    with made.store.snapshot():
        chunks = export.cartridge_of(made.store, made.model, export.chosen(made.store, (), scopes))
    export.save(chunks, made.model, folder, name="tiny")
    return chunks


def loaded(network: Any, folder: Path) -> Any:
    """Return a network as peft gives it back with the adapter of *folder*."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return peft.PeftModel.from_pretrained(network, str(folder)).eval()


def plain_network(family: str, dtype: torch.dtype) -> Any:
    """Return the tiny network as transformers has it, with the angles that the tests in float64 need."""
    network = tiny_network(family, dtype=dtype)
    if dtype == torch.float64:
        network.model.rotary_emb = ExactRotary(network.model.rotary_emb)
    return network.eval().requires_grad_(False)


def ours(made: GistRAG, chunks: export.Cartridge, ids: list[int]) -> torch.Tensor:
    """Return the logits of a question behind the same chunks as an answer places them, from position 0 on."""
    model = made.model
    gists = [
        compress(
            model,
            [model.encode_passage(chunk.text, chunk.heading)],
            GistSettings(placement="selected", tokens_per_gist=6),
        )[0]
        if chunk.id in chunks.again
        else GistCache.unpacked(made.store.gists.load(str(chunk.gist_key)))
        for chunk in chunks.chunks
        if chunk.id not in chunks.texts
    ]
    memory = concatenate([model.prefix, *gists], model.rope, layout=chunks.layout)
    texts = [model.encode_passage(chunk.text, chunk.heading) for chunk in chunks.chunks if chunk.id in chunks.texts]
    memory = read_text(model, memory, [token for text in texts for token in text])
    positions = memory.next_position + torch.arange(len(ids))
    hidden = model.read(memory).feed(torch.tensor([ids]), positions=positions, role="answers")
    return model.logits(hidden)[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_are_equal(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Through peft, the base model gives the logits that an answer from the same spread chunks begins with."""
    made = index(tmp_path, tiny_model(family, dtype=dtype))
    ids = made.model.encode_question(QUESTION)
    chunks = exported(made, tmp_path / "out", *TEXTS)
    assert ("spread", 1) == (chunks.layout, len(chunks.texts))
    assert chunks.memory.next_position == chunks.memory.slots < chunks.source_tokens

    with torch.no_grad():
        theirs = loaded(plain_network(family, dtype), tmp_path / "out")(input_ids=torch.tensor([ids])).logits[0]

    torch.testing.assert_close(theirs, ours(made, chunks, ids), **EQUAL)


def test_generate_of_peft_says_the_same(tmp_path: Path) -> None:
    """The ordinary way to use it, a text through `generate`, gives the tokens of our own loop."""
    made = index(tmp_path, tiny_model())
    exported(made, tmp_path / "out", "mills.md")
    facts = json.loads((tmp_path / "out" / "cartridge.json").read_text("utf-8"))
    asked = facts["before_question"] + QUESTION + facts["after_question"]
    ids = byte_tokenizer()(asked, add_special_tokens=False, return_tensors="pt")
    assert made.model.encode_question(QUESTION) == ids["input_ids"][0].tolist()

    with made.store.snapshot():
        scope = export.chosen(made.store, (), ["mills.md"])
        memory = export.cartridge_of(made.store, made.model, scope).memory
    expected = list(generate(made.model, memory, ids["input_ids"][0].tolist(), max_new_tokens=12))
    reader = loaded(plain_network("llama", torch.float64), tmp_path / "out")
    said = reader.generate(
        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=12, do_sample=False,
        pad_token_id=258,
    )  # fmt: skip

    new = said[0, ids["input_ids"].shape[1] :].tolist()
    assert len(expected) > 3
    assert expected == [token for token in new if token not in made.model.stop_ids]


def test_heads_of_different_budgets_are_evened(tmp_path: Path) -> None:
    """Adaptive gists are made again as selected ones of the same rate, and peft computes what these give."""
    model = tiny_model()
    made = index(tmp_path, model, placement="adaptive")
    ids = model.encode_question(QUESTION)
    chunks = exported(made, tmp_path / "out", "mills.md")
    assert any(GistCache.unpacked(made.store.gists.load(str(chunk.gist_key))).is_ragged for chunk in chunks.chunks)
    assert chunks.memory.visible is None
    assert set(chunks.again) <= {chunk.id for chunk in chunks.chunks}

    with torch.no_grad():
        reader = loaded(plain_network("llama", torch.float64), tmp_path / "out")
        theirs = reader(input_ids=torch.tensor([ids])).logits[0]

    torch.testing.assert_close(theirs, ours(made, chunks, ids), **EQUAL)


def test_with_an_adapter_merged_into_the_base(tmp_path: Path) -> None:
    """Where questions are read with an adapter, the logits are equal once it is merged into the base."""
    model = tiny_model()
    model.new_adapter(rank=2, gists=1)
    assert model.adapter is not None
    torch.manual_seed(1)
    for name, weights in model.adapter.parameters():
        if name != "gist_vectors":
            weights.data = torch.randn_like(weights) * 0.1
    model.adapter.save(tmp_path / "adapter")
    made = index(tmp_path, model)
    ids = model.encode_question(QUESTION)
    chunks = exported(made, tmp_path / "out", "mills.md")

    merged = loaded(plain_network("llama", torch.float64), tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        theirs = loaded(merged, tmp_path / "out")(input_ids=torch.tensor([ids])).logits[0]

    torch.testing.assert_close(theirs, ours(made, chunks, ids), **EQUAL)


def test_what_the_window_does_not_hold_spread_is_packed(tmp_path: Path) -> None:
    """A window too small for the gaps gets the gists side by side, and one too small for them an error."""
    made = index(tmp_path, tiny_model())
    ids = made.model.encode_question(QUESTION)
    small = SimpleNamespace(window=made.model.prefix.gists + 100, prefix=made.model.prefix)
    caches = [made.store.gists.load(row.key) for row in made.store.gists.rows()]
    assert export._layout(small, caches) == "packed"
    with pytest.raises(ContextOverflowError, match="choose fewer"):
        export._layout(SimpleNamespace(window=made.model.prefix.gists + 10, prefix=made.model.prefix), caches)

    made.model.window, window = small.window, made.model.window
    chunks = exported(made, tmp_path / "out", *TEXTS)
    made.model.window = window
    with torch.no_grad():
        reader = loaded(plain_network("llama", torch.float64), tmp_path / "out")
        theirs = reader(input_ids=torch.tensor([ids])).logits[0]

    assert "packed" == chunks.layout
    torch.testing.assert_close(theirs, ours(made, chunks, ids), **EQUAL)


def test_chunks_are_chosen_in_order_and_once(tmp_path: Path, engine: Engine) -> None:
    """Documents in their order, then single chunks; what is not there is named."""
    made = index(tmp_path, engine.model)
    store = made.store
    mills = [chunk.id for chunk in store.chunks_of("mills.md")]
    (bees,) = (chunk.id for chunk in store.chunks_of("bees.md"))
    assert len(mills) > 1

    found = export.chosen(store, [bees, mills[1]], ["mills.md"])

    assert [*mills, bees] == [chunk.id for chunk in found]
    with pytest.raises(UsageError, match="no chunk 99 in"):
        export.chosen(store, [99], [])
    with pytest.raises(UsageError, match=r"none\.md"):
        export.chosen(store, [], ["none.md"])
    with pytest.raises(UsageError, match="--chunk"):
        export.chosen(store, [], [])


def test_a_damaged_gist_is_read_as_text(tmp_path: Path, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """The chunk is in the cartridge all the same, and the log says how."""
    made = index(tmp_path, engine.model)
    (bees,) = made.store.chunks_of("bees.md")
    made.store.gists.path(str(bees.gist_key)).write_bytes(b"no gist")

    with made.store.snapshot():
        chunks = export.cartridge_of(made.store, engine.model, [bees])

    assert (bees.id,) == chunks.texts
    assert "answered from text" in caplog.text


# The command


def test_the_command_writes_a_private_folder(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file is for its owner alone, the card names the passages, and the folder is not written twice."""
    index(tmp_path, engine.model).close()
    monkeypatch.setattr(rag.Engine, "load", lambda settings, **_: engine)
    out = tmp_path / "out"
    arguments = ["--scope", "mills.md", "-o", str(out), "--index", str(tmp_path / "index")]

    assert 0 == run_command(["export", *arguments, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert json.loads((out / "cartridge.json").read_text("utf-8")) == {
        name: value for name, value in told.items() if name != "output"
    }
    assert {"adapter_config.json", "adapter_model.safetensors", "cartridge.json", "README.md"} == {
        path.name for path in out.iterdir()
    }
    assert {0o600} == {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert 0o700 == out.stat().st_mode & 0o777
    assert "mills.md, characters 0 to" in (out / "README.md").read_text("utf-8")
    assert isinstance(peft.PeftConfig.from_pretrained(str(out)), peft.CartridgeConfig)

    assert 2 == run_command(["export", *arguments])
    assert "expected nothing or an empty folder" in capsys.readouterr().err


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No chunk is code 2, no index code 4, each in one line."""
    assert 2 == run_command(["export", "-o", str(tmp_path / "out")])
    assert 4 == run_command(["export", "-o", str(tmp_path / "out"), "--chunk", "1", "--index", str(tmp_path / "none")])
    assert 2 == capsys.readouterr().err.count("\n")
    assert not (tmp_path / "out").exists()


def test_a_model_with_windows_has_no_cartridge(tmp_path: Path) -> None:
    """Where peft would see other slots than an answer does, the export is refused in one line."""
    made = index(tmp_path, tiny_model("gemma3"))

    with pytest.raises(UnsupportedModelError, match="windows of 512 positions"):
        export.cartridge_of(made.store, made.model, export.chosen(made.store, (), ["mills.md"]))
