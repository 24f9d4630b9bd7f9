"""The CPU runtime answers as the torch runtime does, from memories of every kind."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import FAMILIES, byte_tokenizer, tiny_model, tiny_network

from gistrag.answering.assemble import Content, assemble
from gistrag.compression.compress import compress
from gistrag.engine import Engine
from gistrag.errors import UnsupportedModelError
from gistrag.kv.cache import GistCache
from gistrag.model import cpu_conversion, cpu_runtime
from gistrag.model.adapter import Adapter
from gistrag.model.cpu_conversion import open_cpu_runtime, write
from gistrag.model.cpu_memory import CpuMemory
from gistrag.model.cpu_runtime import CpuRuntime, pick
from gistrag.model.generation import generate, generate_batch
from gistrag.model.gist_model import GistModel
from gistrag.model.runtime import Trace
from gistrag.rag import GistRAG
from gistrag.settings import CpuWeights, GistSettings, IndexSettings, Layout

TEXTS = ("the mill stands by the river", "bread is baked at dawn", "tea is drunk at four")
SHARP = {"initializer_range": 0.3, "hidden_size": 64}
"""Large random weights, so that logits differ and the most likely token is the same in either runtime. onnxruntime
needs a head_dim that is a multiple of 16."""


def runtimes(
    folder: Path,
    family: str = "llama",
    *,
    weights: CpuWeights = "float32",
    adapter: bool = False,
    spread: float = 0.3,
    **changes: object,
) -> tuple[GistModel, CpuRuntime]:
    """Return the two runtimes of one tiny model."""
    model = tiny_model(family, dtype=torch.float32, **{**SHARP, "initializer_range": spread, **changes})
    if adapter:
        model.new_adapter(rank=4, gists=1)
        assert model.adapter
        for _, tensor in model.adapter.parameters():
            tensor.data.normal_(std=0.2)
        model.adapter.merge()
    write(model, folder, weights=weights)
    return model, CpuRuntime(folder)


@pytest.fixture(params=[*FAMILIES, "gemma3 nearby"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[GistModel, CpuRuntime]:
    """Both runtimes of a model of each family, with an adapter; of one with windows that end between the passages."""
    family, _, is_nearby = request.param.partition(" ")
    return runtimes(tmp_path, family, adapter=True, **({"sliding_window": 40} if is_nearby else {}))


def contents(model: GistModel, kinds: str) -> list[Content]:
    """Return the three texts as gists (``g``), gists in 8 bits (``q``) or text (``t``)."""
    ids = [model.encode_passage(text) for text in TEXTS]
    caches = compress(model, ids, GistSettings(tokens_per_gist=2))
    makers: dict[str, Callable[[int], Content]] = {
        "g": lambda at: caches[at].packed(),
        "q": lambda at: caches[at].packed("int8"),
        "t": lambda at: ids[at],
    }
    return [makers[kind](at) for at, kind in enumerate(kinds)]


@pytest.mark.parametrize("kinds", ["", "ttt", "qtg"])
def test_pieces_change_nothing(both: tuple[GistModel, CpuRuntime], kinds: str) -> None:
    """Texts and questions that are read three tokens at a time are answered as those read at once, by both."""
    whole, _ = answers(*both, kinds)
    for runtime in both:
        runtime.piece_tokens = 3

    assert answers(*both, kinds) == [whole, whole]


def answers(model: GistModel, runtime: CpuRuntime, kinds: str, **options: object) -> list[list[int]]:
    """Return what each of the two generates behind the same passages."""
    passages, prompt = contents(model, kinds), model.encode_question("Where is the mill?")
    return [
        list(generate(one, assemble(one, passages, **options), prompt, max_new_tokens=12))  # type: ignore[arg-type, misc]
        for one in (model, runtime)
    ]


@pytest.mark.parametrize("kinds", ["", "ggg", "qqq", "ttt", "ggt", "qtg"])
def test_both_generate_the_same(both: tuple[GistModel, CpuRuntime], kinds: str) -> None:
    """From gists, from text and from both, for every family, with an adapter that only reads questions and answers."""
    torch_tokens, cpu_tokens = answers(*both, kinds)

    assert cpu_tokens == torch_tokens


@pytest.mark.parametrize("layout", ["spread", "packed"])
@pytest.mark.parametrize("start", [0, -20])
def test_both_place_gists_alike(tmp_path: Path, layout: Layout, start: int) -> None:
    """In either layout, and moved to another position."""
    torch_tokens, cpu_tokens = answers(*runtimes(tmp_path), "ggg", layout=layout, start=start)

    assert cpu_tokens == torch_tokens


def test_keys_and_values_are_those_of_torch(tmp_path: Path) -> None:
    """A memory holds the same numbers at every slot that a head fills."""
    model, runtime = runtimes(tmp_path)
    passages = contents(model, "ggg")

    expected, found = assemble(model, passages), assemble(runtime, passages)

    assert expected.visible is not None
    assert found.next_position == expected.next_position
    for layer, head in np.ndindex(found.ends.shape):
        rows = expected.kv[layer, :, head][:, expected.visible[layer, head]].numpy()
        end = found.ends[layer, head]
        np.testing.assert_allclose(found.keys[layer, head, :end], rows[0], atol=1e-5)
        np.testing.assert_allclose(found.values[layer, head, :end], rows[1], atol=1e-6)


def test_attention_is_that_of_torch(both: tuple[GistModel, CpuRuntime]) -> None:
    """Every token's attention to every slot of every head, in layers of one's choice."""
    model, runtime = both
    passages, ids = contents(model, "ggt"), model.encode_question("Where?")

    expected = model.attention(assemble(model, passages), ids, layers=[0, 2])
    found = runtime.attention(assemble(runtime, passages), ids, layers=[2, 0])

    assert set(found) == {0, 2}
    for layer, heads in expected.items():
        for one, other in zip(heads, found[layer], strict=True):
            np.testing.assert_allclose(other, one, atol=1e-4)


def test_an_answer_does_not_begin_with_a_line_end(tmp_path: Path) -> None:
    """A plain base model ends its answers at a line end, and often would say nothing else."""
    model, runtime = runtimes(tmp_path)
    ids = model.encode_question("Where?")
    passages = contents(model, "gg")
    (likeliest,) = generate(model, assemble(model, passages), ids, max_new_tokens=1)
    stops = model.stop_ids | {likeliest}

    assert model.line_ends <= model.stop_ids
    for one in (model, runtime):
        one.stop_ids, one.line_ends = stops, frozenset({likeliest})
        tokens = list(generate(one, assemble(one, passages), ids, max_new_tokens=4))
        assert tokens
        assert likeliest not in tokens
    assert tokens == list(generate(model, assemble(model, passages), ids, max_new_tokens=4))


def test_a_trace_is_that_of_torch(both: tuple[GistModel, CpuRuntime]) -> None:
    """Log-probabilities of the answer and its attention to the memory, token by token."""
    traces = []
    for runtime in both:
        memory, ids = assemble(runtime, contents(both[0], "ggt")), runtime.encode_question("Where?")
        traces.append(Trace(layers=(1, 2)))
        tokens = list(generate(runtime, memory, ids, max_new_tokens=5, trace=traces[-1]))
        first = traces[-1].opening

        assert first is not None
        assert tokens[0] == int(first.argmax())
        assert traces[-1].logprobs[0] == pytest.approx(float(first.max()), abs=1e-5)
    expected, found = traces

    assert len(found.attention) == len(found.logprobs) == len(expected.logprobs) >= len(tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-3)
    for step, other in zip(expected.attention, found.attention, strict=True):
        assert set(step) == set(other) == {1, 2}
        for layer, heads in step.items():
            for one, twin in zip(heads, other[layer], strict=True):
                np.testing.assert_allclose(twin, one, atol=1e-4)


def test_a_traced_answer_is_the_answer(both: tuple[GistModel, CpuRuntime]) -> None:
    """Recording changes no token, and what is recorded first is what `attention` gives of the last question token."""
    for runtime in both:
        memory, ids = assemble(runtime, contents(both[0], "gg")), runtime.encode_question("Where?")
        trace = Trace(layers=(0,))
        traced = list(generate(runtime, memory, ids, max_new_tokens=4, trace=trace))
        alone = runtime.attention(memory, ids, layers=[0])[0]

        assert traced == list(generate(runtime, memory, ids, max_new_tokens=4))
        for head, of_question in zip(trace.attention[0][0], alone, strict=True):
            np.testing.assert_allclose(head, of_question[-1], atol=1e-5)


def test_a_conversion_that_traces_answers_the_same(tmp_path: Path) -> None:
    """It gives the attention of its layers from its only session, and that of others from a second one."""
    model, plain = runtimes(tmp_path)
    (tmp_path / "traced").mkdir()
    write(model, tmp_path / "traced", weights="float32", traced=(1,))
    traced = CpuRuntime(tmp_path / "traced")
    memory, ids = assemble(plain, contents(model, "gg")), model.encode_question("Where?")
    own = assemble(traced, contents(model, "gg"))

    expected, found = Trace(layers=(0, 1)), Trace(layers=(1,))
    tokens = list(generate(plain, memory, ids, max_new_tokens=4, trace=expected))

    assert list(generate(traced, own, ids, max_new_tokens=4, trace=found)) == tokens
    assert len(traced._graphs) == 1
    for step, other in zip(expected.attention, found.attention, strict=True):
        for one, twin in zip(step[1], other[1], strict=True):
            np.testing.assert_allclose(twin, one, atol=1e-5)
    both_layers = traced.attention(own, ids, layers=[0, 1])
    for layer, heads in plain.attention(memory, ids, layers=[0, 1]).items():
        for one, twin in zip(heads, both_layers[layer], strict=True):
            np.testing.assert_allclose(twin, one, atol=1e-5)


def test_a_trace_is_of_one_answer(both: tuple[GistModel, CpuRuntime]) -> None:
    """Two rows and one trace are refused, rather than mixed up."""
    for runtime in both:
        memory, ids = assemble(runtime, []), runtime.encode_question("Where?")

        with pytest.raises(ValueError, match="got 2 memories"):
            list(runtime.decode_steps([memory, memory], [ids, ids], max_new_tokens=1, trace=Trace()))


def test_eight_bits_change_little(tmp_path: Path) -> None:
    """Attention in the last layer, which all rounding before it reaches, differs by less than a twentieth."""
    model, runtime = runtimes(tmp_path, weights="int8", spread=0.1)
    passages, ids = contents(model, "ggt"), model.encode_question("Where?")

    expected = model.attention(assemble(model, passages), ids, layers=[2])[2]
    found = runtime.attention(assemble(runtime, passages), ids, layers=[2])[2]

    assert max(float(np.abs(one - other).max()) for one, other in zip(expected, found, strict=True)) < 0.05


def test_rows_of_a_batch_do_not_mix(tmp_path: Path) -> None:
    """What is generated side by side is what is generated alone, and rows may share a memory."""
    model, runtime = runtimes(tmp_path)
    shared = assemble(runtime, contents(model, "gqt"))
    memories = [shared, assemble(runtime, []), shared]
    prompts = [model.encode_question(question) for question in ("Where is the mill?", "Tea?", "When is bread baked?")]

    together = generate_batch(runtime, memories, prompts, max_new_tokens=8)

    alone = [list(generate(runtime, *row, max_new_tokens=8)) for row in zip(memories, prompts, strict=True)]
    assert together == alone


def test_a_memory_can_be_asked_again(tmp_path: Path) -> None:
    """What one answer wrote behind a memory does not reach the next."""
    model, runtime = runtimes(tmp_path)
    memory, prompt = assemble(runtime, contents(model, "ggg")), model.encode_question("Where?")

    first, _, again = (list(generate(runtime, memory, one, max_new_tokens=8))
                       for one in (prompt, model.encode_question("When is tea?"), prompt))  # fmt: skip

    assert again == first


def test_what_is_read_behind_a_memory_stays(tmp_path: Path) -> None:
    """A memory with text behind it is not touched by what is read or asked behind the same gists later."""
    model, runtime = runtimes(tmp_path)
    gists, ids = runtime.concatenate(contents(model, "gg")[:2]), model.encode_passage(TEXTS[2])  # type: ignore[arg-type]
    prompt = model.encode_question("When is tea?")
    with_text = runtime.read_text(gists, ids)
    before = list(generate(runtime, with_text, prompt, max_new_tokens=8))

    list(generate(runtime, gists, model.encode_question("Where is the mill by the river?"), max_new_tokens=8))
    runtime.read_text(gists, model.encode_passage(TEXTS[0]))

    assert list(generate(runtime, with_text, prompt, max_new_tokens=8)) == before


def test_full_buffers_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no room is left behind a memory, it moves to a larger buffer."""
    model, runtime = runtimes(tmp_path)
    monkeypatch.setattr(cpu_runtime, "ROOM", 0)

    torch_tokens, cpu_tokens = answers(model, runtime, "gtt")

    assert cpu_tokens == torch_tokens


def test_threads_answer_side_by_side(tmp_path: Path) -> None:
    """One runtime answers several questions at the same time."""
    model, runtime = runtimes(tmp_path)
    passages, prompt = contents(model, "ggt"), model.encode_question("Where?")

    def answer(_: int) -> list[int]:
        return list(generate(runtime, assemble(runtime, passages), prompt, max_new_tokens=10))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(answer, range(8)))

    assert found == [found[0]] * 8


def test_sampling_follows_its_seed(tmp_path: Path) -> None:
    """The same seed draws the same tokens, and another one others."""
    model, runtime = runtimes(tmp_path)
    memory, prompt = assemble(runtime, contents(model, "ggg")), model.encode_question("Where?")

    one, same, other = (list(generate(runtime, memory, prompt, max_new_tokens=20, temperature=5.0, seed=seed))
                        for seed in (1, 1, 2))  # fmt: skip

    assert same == one
    assert other != one


@pytest.mark.parametrize("temperature", [1e-40, 1e-3, 1e30])
def test_any_temperature_draws_a_token(temperature: float) -> None:
    """Near zero the most likely one."""
    logits = np.array([1.0, 3.0, 2.0], np.float32)

    drawn = {pick(logits, temperature, np.random.default_rng(seed)) for seed in range(50)}

    assert drawn == ({1} if temperature < 1 else {0, 1, 2})


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """Twice the probability is drawn twice as often."""
    logits, randomness = np.log(np.array([0.25, 0.5, 0.25], np.float32)), np.random.default_rng(0)

    drawn = np.bincount([pick(logits, 1.0, randomness) for _ in range(4000)]) / 4000

    np.testing.assert_allclose(drawn, [0.25, 0.5, 0.25], atol=0.03)


# Conversion


@pytest.fixture
def saved(tmp_path: Path, private_cache: Path) -> Path:
    """A tiny model in a folder, and an empty cache."""
    tiny_network(dtype=torch.bfloat16, **SHARP).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders that are written from here on."""
    made: list[Path] = []
    real = cpu_conversion.write

    def spy(model: GistModel, folder: Path, *, weights: CpuWeights, traced: Sequence[int]) -> None:
        made.append(folder)
        real(model, folder, weights=weights, traced=traced)

    monkeypatch.setattr(cpu_conversion, "write", spy)
    return made


def test_a_model_is_converted_once(saved: Path, conversions: list[Path]) -> None:
    """The second time its files are opened; they say what the torch runtime says of the model."""
    first, second = open_cpu_runtime(saved, None), open_cpu_runtime(saved, None)

    model = GistModel.load(saved)
    assert len(conversions) == 1
    assert first.folder == second.folder
    assert (second.fingerprint, second.prefix_slots) == (model.fingerprint, model.prefix_slots)
    assert (second.window, second.stop_ids, second.end_id) == (model.window, model.stop_ids, model.end_id)
    assert second.encode_question("Is <|im_end|> text?") == model.encode_question("Is <|im_end|> text?")


@pytest.mark.parametrize("name", ["answers.weights", "answers.onnx", "runtime.json", "tokenizer.json", "files.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_conversion_is_made_again(
    saved: Path, conversions: list[Path], caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    """Whichever file it is, with one line that says so."""
    path = open_cpu_runtime(saved, None).folder / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] + (b"" if damage == "cut" else bytes([data[len(data) // 2] ^ 255])))

    with caplog.at_level(logging.WARNING):
        runtime = open_cpu_runtime(saved, None)

    assert len(conversions) == 2
    assert [record.message for record in caplog.records if "damaged" in record.message]
    assert len(list(generate(runtime, runtime.concatenate([]), [1, 2], max_new_tokens=2))) <= 2


def test_an_unfinished_conversion_is_never_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies while it converts leaves nothing under the name of the conversion."""
    real = cpu_conversion.write

    def dying(model: GistModel, folder: Path, *, weights: CpuWeights, traced: Sequence[int]) -> None:
        real(model, folder, weights=weights, traced=traced)
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_conversion, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        open_cpu_runtime(saved, None)

    assert not [path for path in (saved.parent / "cache" / "cpu").iterdir() if not path.name.startswith(".")]


def test_two_may_convert_at_the_same_time(saved: Path) -> None:
    """Both get the same conversion."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: open_cpu_runtime(saved, None), range(2))

    assert first.folder == second.folder


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "no space left in the cache"),
        (OSError(13, "Permission denied"), "set GISTRAG_CACHE"),
        (UnsupportedModelError("no AVX2"), "no AVX2"),
    ],
)
def test_torch_answers_where_the_cpu_runtime_cannot(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, told: str
) -> None:
    """A full disk, a cache that cannot be written, a processor or model it does not know: one line, and torch."""

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cpu_conversion, "write", failing)
    monkeypatch.setattr(
        "gistrag.engine.Embedder", lambda *_, **__: type("Blind", (), {"embed_query": lambda *_: None})()
    )

    with caplog.at_level(logging.WARNING):
        engine = Engine.load(IndexSettings(model=str(saved), adapter="none"), device="cpu")

    assert engine.runtime.name == "torch"
    (line,) = [record.message for record in caplog.records]
    assert (line.startswith("answering with torch, which is slower on a CPU: "), told in line) == (True, True)


def test_the_adapter_is_part_of_the_name(saved: Path, tmp_path: Path) -> None:
    """Another adapter is another conversion, and only one without an adapter reads text by the same weights."""
    model = GistModel.load(saved)
    model.new_adapter(rank=4, gists=1)
    assert isinstance(model.adapter, Adapter)
    model.adapter.save(tmp_path / "adapter")

    plain, adapted = open_cpu_runtime(saved, None), open_cpu_runtime(saved, tmp_path / "adapter")

    assert plain.folder != adapted.folder
    assert [(folder / "text.onnx").exists() for folder in (plain.folder, adapted.folder)] == [False, True]


def test_gists_of_torch_are_taken_too(tmp_path: Path) -> None:
    """A gist cache that was just made need not go through a file."""
    model, runtime = runtimes(tmp_path)
    (cache,) = compress(model, [model.encode_passage(TEXTS[0])], GistSettings(tokens_per_gist=2))

    made, packed = runtime.concatenate([cache]), runtime.concatenate([cache.packed()])

    assert isinstance(cache, GistCache)
    assert isinstance(made, CpuMemory)
    np.testing.assert_array_equal(made.ends, packed.ends)


ASK = """
import sys
from gistrag import GistRAG
with GistRAG.open(sys.argv[1]) as rag:
    answer = rag.query("Which port does the mill's server listen at?", max_new_tokens=12)
print(rag.runtime.name, answer.usage.gist_slots > 0, answer)
print(sorted({"torch", "transformers", "peft", "sentence_transformers", "onnx"} & set(sys.modules)))
"""


@pytest.mark.model
def test_an_answer_loads_no_torch(tmp_path: Path) -> None:
    """With the default models, a process that opens an index and answers from gists imports none of the heavy parts."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "mill.md").write_text(
        "# The mill\n\nThe server of the mill listens at port 4711. It grinds rye in the morning, oats at night, and "
        "the miller writes every sack into a ledger that hangs beside the door.\n",
        "utf-8",
    )
    GistRAG.from_folder(tmp_path / "docs", index=tmp_path / "index", gists="now", device="cpu").close()

    asked = [sys.executable, "-c", ASK, str(tmp_path / "index")]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["cpu True 4711", "[]"]
