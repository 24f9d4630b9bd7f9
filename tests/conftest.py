"""Tiny models for the fast tests, the real default ones for the tests marked `model`."""

from __future__ import annotations

import gc
import hashlib
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gistrag.model import GistModel

if TYPE_CHECKING:
    from gistrag.rag import Engine

gc.disable()  # until all is imported and collected, see pytest_collection_finish
os.environ["GISTRAG_TINY"] = "1"  # notebooks run on less than they show
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell, where builds could not be
    signal.signal(signal.SIGINT, signal.default_int_handler)  # interrupted: what is started here inherits it
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WITHOUT_A_MODEL = {"04_results.ipynb"}
collect_ignore = ["data", "fuzz"]  # documents, some of them Python, and a program that is no test

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}


def pytest_collection_finish() -> None:
    """Look for garbage from here on, and not among the modules and tests that stay until the end."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every notebook that loads the default model."""
    for item in items:
        if item.path.parent == NOTEBOOKS and item.path.name not in WITHOUT_A_MODEL:
            item.add_marker(pytest.mark.model)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests measured and recorded as ``report``."""
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == "report":
                terminalreporter.write_line(line)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class ExactRotary(torch.nn.Module):
    """The rotary embedding of transformers without its rounding of angles to float32."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        self.inv_freq, self.attention_scaling = original.inv_freq, original.attention_scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] * self.inv_freq
        twice = torch.cat((angles, angles), dim=-1)
        return (twice.cos() * self.attention_scaling).to(x.dtype), (twice.sin() * self.attention_scaling).to(x.dtype)


def tiny_network(family: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: object) -> torch.nn.Module:
    """Return a small random model of a family, always the same one."""
    torch.manual_seed(0)
    shape = {**SHAPE, **({"sliding_window": None} if family == "mistral" else {}), **changes}
    config = FAMILIES[family](**shape)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: object) -> GistModel:
    """Return a small random `GistModel`; float64, so that equality can be asked for to twelve digits."""
    network = tiny_network(family, dtype=dtype, **changes)
    if dtype == torch.float64:
        network.model.rotary_emb = ExactRotary(network.model.rotary_emb)
    return GistModel(network, byte_tokenizer(), identity=f"tiny {family}")


@pytest.fixture(scope="session")
def model() -> GistModel:
    """A tiny random llama."""
    return tiny_model()


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def any_model(request: pytest.FixtureRequest) -> GistModel:
    """A tiny random model of every supported family."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def default_model() -> GistModel:
    """The real default model."""
    from gistrag.catalog import find
    from gistrag.settings import DEFAULT_MODEL

    return GistModel.load(find(DEFAULT_MODEL).path)


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user cache of its own."""
    monkeypatch.setenv("GISTRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class HashEmbedder:
    """An embedder without a model: a text is the sum of a direction for each of its words."""

    DIM = 64
    WINDOW_WORDS = 16

    def __init__(self, name: str = "hash") -> None:
        self.fingerprint = {"embedder": name}

    def embed_query(self, question: str) -> npt.NDArray[np.float32]:
        """Return the normalised vector of a text, ``(dim,)``."""
        words = re.findall(r"\w+", question.lower()) or [""]
        seeds = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") for word in words]
        vector = sum(np.random.default_rng(seed).standard_normal(self.DIM) for seed in seeds)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def embed_documents(self, texts: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """Return one vector for every `WINDOW_WORDS` words of each text, ``(parts, dim)``."""
        return [np.stack([self.embed_query(window) for window in self._windows(text)]) for text in texts]

    def _windows(self, text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[i : i + self.WINDOW_WORDS]) for i in range(0, max(len(words), 1), self.WINDOW_WORDS)]


@pytest.fixture(scope="session")
def engine(model: GistModel) -> Engine:
    """A tiny model and an embedder without one."""
    from gistrag.rag import Engine

    return Engine(model, HashEmbedder())


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute tiny models in one thread: on a busy machine, waiting for a second one takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.node.get_closest_marker("model") else 1)
    yield
    torch.set_num_threads(threads)


_unpickled: list[str] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _unpickled.append(".".join(map(str, arguments)))


sys.addaudithook(_listen)  # cannot be taken back: it listens for as long as the process lives


@pytest.fixture(autouse=True)
def nothing_unpickled() -> Iterator[None]:
    """Let no test load a class or function by a name that stands in data, as pickle does."""
    _unpickled.clear()
    yield
    assert [] == _unpickled
