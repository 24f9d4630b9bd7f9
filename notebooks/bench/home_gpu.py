"""Whether training, compression and serving of an 8B model fit a home GPU of 24 GB, and how long they take there.

    python notebooks/bench/home_gpu.py --output home-gpu.json       on a CUDA GPU; writes 16 GB of weights first
    python notebooks/bench/home_gpu.py --dry-run                    two layers of the same widths, on any machine

The model has the shape of Llama-3-8B-Instruct in NF4 with *random* weights: memory and speed are those of the real one,
answers mean nothing and none is judged. Everything runs through the code of `gistrag train`, `build` and `query`: a
step of the recipe ``24gb``, compression, and the first token from 20 chunks read as text, loaded as uncompressed KV
caches, and loaded as gists. On a larger GPU the process may use no more than the cap. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gistrag.compression.compress import compress
from gistrag.evaluation.arms import Arm, gist_arm
from gistrag.evaluation.cases import Case
from gistrag.evaluation.corpus import Passage
from gistrag.evaluation.speed import Stopwatch, peak_bytes, reset_peak
from gistrag.model.gist_model import GistModel
from gistrag.qa.dataset import Context, Task
from gistrag.training.recipe import RECIPES, LossWeights
from gistrag.training.sampler import Sampler
from gistrag.training.trainer import Trainer

CAP_BYTES = 24_000_000_000
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
CHAT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
WORDS = ("river", "mill", "harbour", "crane", "sluice", "rye", "oats", "ledger", "lantern", "copper", "quarry", "ferry")


def main() -> None:
    """Measure, print a table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="two layers; few and short chunks and questions")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--chunk-tokens", type=int, default=380)
    parser.add_argument("--steps", type=int, default=3, help="QLoRA steps, of which the first is to warm up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the random weights are kept, or are already")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.dry_run:
        given.chunks, given.chunk_tokens, given.steps, given.repeats = 3, 56, 2, 1
    elif not torch.cuda.is_available():
        parser.error("no CUDA GPU here; --dry-run runs anywhere")
    cap_bytes = cap()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch) / "model"
        if not (folder / "config.json").exists():
            make(folder, layers=2 if given.dry_run else LLAMA_3_8B["num_hidden_layers"])
        found = measure(folder, given)
    found = {
        "shape": "two layers as wide as those of Llama-3-8B" if given.dry_run else "Llama-3-8B",
        "weights": "random, NF4",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "cap_bytes": cap_bytes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        **found,
    }
    for stage, figures in found["stages"].items():
        print(f"{stage:<28} peak {figures['peak_bytes'] / 1e9:6.2f} GB   {figures['told']}")
    print(json.dumps(found))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def cap() -> int | None:
    """Let this process use no more of a GPU than a home one has, and return how much that is."""
    if not torch.cuda.is_available():
        return None
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total))
    return min(CAP_BYTES, total)


def make(folder: Path, *, layers: int) -> None:
    """Save a model of random weights with a tokenizer of bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": layers})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    network.save_pretrained(folder, max_shard_size="2GB")
    del network
    free()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of every stage."""
    stages: dict[str, dict[str, Any]] = {}
    started_s = time.perf_counter()
    model = GistModel.load(folder, quantize="nf4")
    loaded_s = time.perf_counter() - started_s
    stages["loading"] = {"seconds": loaded_s, "peak_bytes": peak_bytes(model), "told": f"{loaded_s:.1f} s"}
    texts = passages(given.chunks, given.chunk_tokens)
    recipe = RECIPES["24gb"]
    short = {"chunk_tokens": given.chunk_tokens, "question_tokens": 48} if given.dry_run else {}
    recipe = replace(recipe, mixture=replace(recipe.mixture, **short))
    stages["QLoRA step, recipe 24gb"] = train(model, texts, recipe, steps=given.steps)

    with watched(model) as figures:
        ids = [model.encode_passage(text) for text in texts]
        caches = compress(model, ids)
    tokens = sum(cache.source_tokens for cache in caches)
    figures |= {"tokens_per_s": tokens / figures["seconds"], "told": f"{tokens / figures['seconds']:,.0f} tokens/s"}
    stages["compression, matched, 4"] = figures

    del caches
    return {"stages": {**stages, **serve(model, texts, given)}}


def train(model: GistModel, texts: list[str], recipe: Any, *, steps: int) -> dict[str, Any]:
    """Return time and memory of steps of a recipe; the adapter stays."""
    contexts = [
        Context(text, f"article {number // 4}", tuple(Task(f"What of {word}?", (word,)) for word in WORDS[:4]))
        for number, text in enumerate(texts)
    ]
    model.new_adapter(rank=recipe.rank, gists=1)
    recipe = replace(
        recipe, steps=steps, loss_weights=LossWeights(teacher_from=0.0)
    )  # with the teacher's pass, which takes most
    trainer = Trainer(model, Sampler(model, contexts, recipe.mixture, seed=0), recipe)
    tokens, seconds = [], []
    reset_peak(model)
    for _ in range(steps):
        started_s = time.perf_counter()
        told = trainer.advance()
        synchronise()
        seconds.append(time.perf_counter() - started_s)
        tokens.append(told["tokens"])
    peak = peak_bytes(model)
    model.network.eval()
    del trainer
    free()
    rate = sum(tokens[1:]) / sum(seconds[1:])
    return {
        "seconds": statistics.median(seconds[1:]),
        "tokens_per_s": rate,
        "peak_bytes": peak,
        "told": f"{statistics.median(seconds[1:]):.2f} s a step, {rate:,.0f} tokens/s",
    }


def serve(model: GistModel, texts: list[str], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return time to first token, decoding and memory from text, uncompressed caches and gists of the same chunks."""
    chunks = tuple(Passage(text, (), given.chunk_tokens) for text in texts)
    case = Case("questions", "0", "What of the mill?", ("rye",), chunks, 16)
    arms = [
        Arm("text", "text"),
        Arm("uncompressed KV", "gists", "selected", 1),
        *(gist_arm("matched", rate) for rate in (4, 8, 16)),
    ]
    with Stopwatch(model, "int8") as stopwatch:
        samples = list(stopwatch.samples({"chunks": [case]}, arms, repeats=given.repeats))
    stages: dict[str, dict[str, Any]] = {}
    for arm in arms:
        taken = [sample for sample in samples if sample["arm"] == arm.name]
        names = ("ttft_s", "load_s", "decode_tokens_per_s", "source_tokens")
        figures: dict[str, Any] = {name: statistics.median(sample[name] for sample in taken) for name in names}
        figures["peak_bytes"] = max(sample["peak_bytes"] for sample in taken)
        figures["times_sooner"] = stages.get("serving, text", figures)["ttft_s"] / figures["ttft_s"]
        figures["told"] = (
            f"first token {figures['ttft_s']:.3f} s ({figures['times_sooner']:.1f} times sooner than text), "
            f"{figures['decode_tokens_per_s']:.1f} tokens/s, {figures['source_tokens']:,.0f} tokens of text"
        )
        stages[f"serving, {arm.name}"] = figures
    return stages


def passages(count: int, tokens: int) -> list[str]:
    """Return random texts of so many bytes, which are tokens here, frame included."""
    randomness = random.Random(0)
    return [" ".join(randomness.choices(WORDS, k=tokens))[: tokens - 24] for _ in range(count)]


@contextmanager
def watched(model: GistModel) -> Iterator[dict[str, Any]]:
    """Fill in the seconds and the peak memory of the block."""
    figures: dict[str, Any] = {}
    reset_peak(model)
    started_s = time.perf_counter()
    yield figures
    synchronise()
    figures |= {"seconds": time.perf_counter() - started_s, "peak_bytes": peak_bytes(model)}


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
