"""`gistrag train`: what it makes, what it refuses, and how it resumes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_models import FAMILIES, byte_tokenizer, tiny_model, tiny_network

from gistrag.cli.main import main as run_command
from gistrag.errors import FingerprintMismatchError, ModelNotFoundError, UsageError
from gistrag.model.adapter import Adapter
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find_adapter
from gistrag.settings import AdapterSettings
from gistrag.training.checkpoints import read_log
from gistrag.training.recipe import Recipe
from gistrag.training.sampler import Mixture

TINY = Recipe(
    steps=3, rank=2,
    mixture=Mixture(rates={2: 1.0}, contexts=2, chunk_tokens=32, question_tokens=64, chunks=(0.5, 0.5)),
)  # fmt: skip


@pytest.fixture
def model_folder(tmp_path: Path, private_cache: Path) -> Path:
    """A tiny random model as a folder."""
    folder = tmp_path / "model"
    tiny_network().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file of question records about a few articles, one line broken."""
    path = tmp_path / "qa.jsonl"
    records = [
        {
            "context": f"The mill {n} has {n} wheels.",
            "question": "How many?",
            "answer": str(n),
            "source": f"{n % 20}.md",
        }
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "broken\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of three tiny steps."""
    path = tmp_path / "recipe.json"
    path.write_text(TINY.to_json())
    return path


def test_a_run_leaves_an_adapter_that_loads(
    model_folder: Path, questions: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command trains, says what it left out, prints one JSON line, and leaves adapter, log and curve."""
    out = tmp_path / "run"

    code = run_command(["train", str(questions), "-o", str(out), "--model", str(model_folder), "--recipe", str(recipe)])

    shown = capsys.readouterr()
    assert 0 == code, shown.err
    assert f"skipped 1 lines of {questions}" in shown.err
    assert json.loads(shown.out.splitlines()[-1])["step"] == 3
    model = GistModel.load(model_folder, adapter=out / "adapter")
    assert model.adapter is not None
    assert model.adapter.settings.rates[0] == 2
    assert model.adapter.settings.tokens_per_gist == 4
    assert (out / "curve.png").exists()


def test_a_trained_adapter_learns_another_placement(
    model_folder: Path, questions: Path, recipe: Path, tmp_path: Path
) -> None:
    """A run that starts from an adapter leaves one that says what it was trained for last."""
    given = [str(questions), "--model", str(model_folder), "--recipe", str(recipe)]
    assert run_command(["train", *given, "-o", str(tmp_path / "first"), "--steps", "1"]) == 0
    then = ["--adapter", str(tmp_path / "first/adapter"), "--placement", "matched", "-o", str(tmp_path / "second")]

    assert run_command(["train", *given, *then, "--steps", "1"]) == 0

    first, second = (AdapterSettings.read(tmp_path / name / "adapter") for name in ("first", "second"))
    assert first.placement == "anchored"
    assert first.index_placement == "anchored"
    assert second.placement == "matched"
    assert second.index_placement == "matched"
    assert second.recipe["steps"] == 1
    assert second.recipe["placement"] == "matched"


@pytest.mark.model
def test_processes_that_train_together_make_one_run(questions: Path, tmp_path: Path) -> None:
    """Two, started by torchrun, share the batches: each step stands in the log once and holds what both have read."""
    steps, recipe = {}, replace(TINY, steps=2)
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    for count in (1, 2):
        launch = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(count),
            "-m",
            "gistrag",
            "train",
            str(questions),
        ]
        given = ["-o", str(tmp_path / f"by-{count}"), "--recipe", str(tmp_path / "recipe.json"), "--json"]
        ran = subprocess.run(
            [sys.executable, *launch, *given],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert 0 == ran.returncode, ran.stderr
        assert [json.loads(line)["step"] for line in ran.stdout.splitlines()] == [2]
        steps[count] = read_log(tmp_path / f"by-{count}")

    assert [[record["step"] for record in records] for records in steps.values()] == [[1, 2], [1, 2]]
    assert sum(one["tokens"] for one in steps[2]) > 1.5 * sum(one["tokens"] for one in steps[1])
    assert (tmp_path / "by-2" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_any_base_learns_a_few_steps(
    family: str, quantize: str, questions: Path, recipe: Path, tmp_path: Path, private_cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every supported family trains, in bf16 and over a base in 4 bits, and its adapter loads."""
    folder = tmp_path / family
    tiny_network(family, hidden_size=64, intermediate_size=64).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    out = tmp_path / "run"
    dials = ["--model", str(folder), "--recipe", str(recipe), "--quantize", quantize]

    code = run_command(["train", str(questions), "-o", str(out), *dials])

    assert 0 == code, capsys.readouterr().err
    assert GistModel.load(folder, adapter=out / "adapter", quantize=quantize).adapter is not None


def test_packed_weights_are_not_trained(tmp_path: Path, private_cache: Path) -> None:
    """A 4-bit model that has read on a CPU passes wrong gradients, so it is refused."""
    tiny_network(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = GistModel.load(tmp_path, quantize="nf4")
    states = [getattr(weights, "quant_state", None) for weights in model.network.parameters()]
    for state in filter(None, states):
        state.packing_format_for_cpu = True

    with pytest.raises(UsageError, match="load it anew"):
        model.prepare_training()


def test_the_same_command_goes_on(
    model_folder: Path, questions: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was cut by --minutes goes on, and one that is done has nothing left to do."""
    arguments = [str(questions), "-o", str(tmp_path / "run"), "--model", str(model_folder), "--recipe", str(recipe)]

    codes = [run_command(["train", *arguments, *more]) for more in (["--minutes", "0"], [], [])]

    steps = [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()]
    assert codes == [0, 0, 0]
    assert steps == [0, 3, 3]


def test_another_run_is_not_taken_for_this_one(
    model_folder: Path, questions: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other questions, or other articles held out, the folder of a run that is done is refused."""
    given = ["-o", str(tmp_path / "run"), "--model", str(model_folder), "--recipe", str(recipe)]
    other = tmp_path / "other.jsonl"
    other.write_bytes(questions.read_bytes() + b"\n")

    codes = [
        run_command(["train", str(path), *given, *more])
        for path, more in ((questions, []), (other, []), (questions, ["--held-out", "0.3"]))
    ]

    assert codes == [0, 2, 2]
    told = capsys.readouterr().err
    assert "was made with data" in told
    assert "was made with held_out '0.1', this one has '0.3'" in told
    assert AdapterSettings.read(tmp_path / "run" / "adapter").held_out == 0.1


def test_what_an_adapter_cannot_be_is_refused(
    model_folder: Path, questions: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is there keeps its rank, has no learned gists, and remembers what it once saw."""
    given = [str(questions), "--model", str(model_folder), "--recipe", str(recipe), "--steps", "1"]
    assert run_command(["train", *given, "-o", str(tmp_path / "first"), "--rank", "2", "--held-out", "0.05"]) == 0
    then = [*given, "--adapter", str(tmp_path / "first/adapter"), "-o", str(tmp_path / "second")]

    codes = [run_command(["train", *then, *more]) for more in (["--rank", "4"], ["--placement", "learned"], [])]

    assert codes == [2, 2, 0]
    told = capsys.readouterr().err
    assert "has rank 2, but --rank 4 was requested" in told
    assert "has no learned gists" in told
    settings = AdapterSettings.read(tmp_path / "second" / "adapter")
    assert settings.recipe["rank"] == 2
    assert settings.held_out == 0.05


def test_output_that_is_a_file_is_refused_at_once(
    model_folder: Path, questions: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is loaded."""
    (tmp_path / "run").touch()

    code = run_command(["train", str(questions), "-o", str(tmp_path / "run" / "x"), "--model", str(model_folder)])

    assert code == 2
    assert f"{tmp_path / 'run'} is a file; name another --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["missing.jsonl"], 2, "cannot read missing.jsonl"),
        (["QUESTIONS", "--recipe", "none"], 2, "no recipe 'none'"),
        (["QUESTIONS", "--adapter", "nowhere"], 2, "no adapter 'nowhere'"),
        (["QUESTIONS", "--model", "nowhere"], 2, "no folder or file 'nowhere'"),
        (["DAMAGED"], 2, "cannot read"),
        (["EMPTY"], 2, "found none that can be used"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], code: int, told: str, questions: Path, model_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever is wrong with the input, one line says it and nothing is made."""
    (tmp_path / "empty.jsonl").touch()
    damaged = bytearray(gzip.compress(questions.read_bytes()))
    damaged[20:30] = bytes(10)
    (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
    named = {
        "QUESTIONS": str(questions),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "DAMAGED": str(tmp_path / "damaged.jsonl.gz"),
    }
    model = [] if "--model" in arguments else ["--model", str(model_folder)]

    found = run_command(["train", *(named.get(one, one) for one in arguments), "-o", str(tmp_path / "run"), *model])

    shown = capsys.readouterr().err.strip().splitlines()
    assert found == code
    assert told in shown[-1]
    assert not (tmp_path / "run").exists()


def test_a_gpu_reports_the_memory_of_the_first_step(
    model_folder: Path, questions: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The peak is measured, not estimated, and stands in the JSON line; without a GPU nothing is reported."""
    arguments = [str(questions), "--model", str(model_folder), "--recipe", str(recipe), "--steps", "1"]
    assert run_command(["train", *arguments, "-o", str(tmp_path / "cpu")]) == 0
    on_cpu = capsys.readouterr()
    monkeypatch.setattr("gistrag.training.trainer.Trainer.gpu_peak_bytes", lambda _: 16_100_000_000)

    assert run_command(["train", *arguments, "-o", str(tmp_path / "gpu")]) == 0

    on_gpu = capsys.readouterr()
    assert "GPU memory" not in on_cpu.err
    assert json.loads(on_cpu.out)["gpu_peak_bytes"] is None
    assert "the first step used at most 16.1 GB of GPU memory" in on_gpu.err
    assert json.loads(on_gpu.out)["gpu_peak_bytes"] == 16_100_000_000


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    """Adapter and base belong together; both are named."""
    model = tiny_model()
    model.new_adapter(rank=2, gists=1)
    assert model.adapter is not None
    model.adapter.save(tmp_path)
    other = tiny_model("qwen2")

    with pytest.raises(FingerprintMismatchError, match="base model 'tiny llama', this one has 'tiny qwen2'"):
        Adapter.load(other.network, tmp_path, base=other.weights, prefix=other.prompt.prefix)
    with pytest.raises(FingerprintMismatchError, match="prefix"):
        Adapter.load(other.network, tmp_path, base="tiny llama", prefix="another prompt")


@pytest.mark.parametrize("content", [None, "{}", "no json", '{"base": "x", "rates": [2], "unknown": 1}'])
def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, content: str | None) -> None:
    """What is no adapter of this library is not taken for one."""
    if content is not None:
        (tmp_path / "gist_settings.json").write_text(content)

    with pytest.raises(ModelNotFoundError, match="expected a gist adapter"):
        AdapterSettings.read(tmp_path)


def test_damaged_adapter_weights_are_refused(tmp_path: Path) -> None:
    """A file that was cut off is one line, not a traceback."""
    model = tiny_model()
    model.new_adapter(rank=2, gists=1)
    assert model.adapter is not None
    model.adapter.save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    fresh = tiny_model()

    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Adapter.load(fresh.network, tmp_path, base=fresh.weights, prefix=fresh.prompt.prefix)


def test_adapters_are_found_by_name_folder_and_base(tmp_path: Path, model_folder: Path) -> None:
    """None is none, auto is none where nothing is shipped for a base, and a folder is itself."""
    model = tiny_model()
    model.new_adapter(rank=2, gists=1)
    assert model.adapter is not None
    model.adapter.save(tmp_path / "mine")

    assert find_adapter("none", model_folder) is None
    assert find_adapter("auto", model_folder) is None
    assert tmp_path / "mine" == find_adapter(str(tmp_path / "mine"), model_folder)
