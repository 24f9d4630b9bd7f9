"""The loaded models, which several indexes can share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gistrag.answering.confidence import Calibration, Similarity
from gistrag.answering.judge import Judge
from gistrag.errors import ResourceError, UnsupportedModelError, UsageError
from gistrag.index.embedder import Embedder, Reranker
from gistrag.index.fingerprint import gist_fingerprint
from gistrag.model.device import has_gpu
from gistrag.model.gguf import converted
from gistrag.model.hub import find, find_adapter
from gistrag.model.runtime import AnyRuntime
from gistrag.settings import AUTO, DEFAULT_EMBEDDER, IndexSettings, RuntimeName

if TYPE_CHECKING:
    from gistrag.model.gist_model import GistModel

logger = logging.getLogger("gistrag")


@dataclass
class Engine:
    """The loaded models; indexes made with the same ones can share an engine.

    Attributes:
        runtime: answers; the torch runtime also makes gists.
        embedder: of questions and chunks; reranker: a cross-encoder, or None.
        load_model: loads the model that makes gists, where `runtime` cannot; adapter: folder of its adapter.
        calibration: finds the evidence of an answer and says how sure it is; None where the adapter has none.
    """

    runtime: AnyRuntime
    embedder: Embedder
    reranker: Reranker | None = None
    load_model: Callable[[], GistModel] | None = field(default=None, repr=False)
    adapter: Path | None = None
    calibration: Calibration | None = None

    @classmethod
    def load(
        cls,
        settings: IndexSettings,
        *,
        device: str | None = None,
        reranker: str | None = None,
        runtime: RuntimeName = "auto",
    ) -> Engine:
        """Return the models an index is made with, loaded one after the other.

        Args:
            device: a torch device; by default a GPU where there is one.
            reranker: hub id or folder of a cross-encoder.
            runtime: what answers; ``auto`` is ``cpu`` where no GPU is. What it cannot run goes to torch, with a
                warning.

        Raises:
            ModelNotFoundError: with the command that brings the model.
        """
        path = find(settings.model).path
        adapter = find_adapter(settings.adapter, path)

        def load_model() -> GistModel:
            from gistrag.model.gist_model import GistModel  # torch, which a process that only answers does without

            return GistModel.load(path, adapter=adapter, quantize=settings.quantize, device=device)

        calibration = Calibration.read(adapter) if adapter else None
        light = _cpu_runtime(path, adapter, settings, device, runtime, calibration)
        name = DEFAULT_EMBEDDER if settings.embedder == AUTO else settings.embedder
        embedder = Embedder(find(name).path, device=device, name=name)
        embedder.embed_query("warm up")
        ranks = Reranker(find(reranker).path, device=device) if reranker else None
        return cls(light or load_model(), embedder, ranks, load_model, adapter, calibration)

    @cached_property
    def model(self) -> GistModel:
        """The torch runtime, which makes gists; loaded at its first use."""
        if self.runtime.name == "torch" or self.load_model is None:
            return self.runtime  # type: ignore[return-value]  # the runtime of this name is a GistModel
        return self.load_model()

    def judge(self, question: str) -> Judge:
        """Return what judges the answers to a question."""
        return Judge(self.calibration, question, Similarity(self.embedder, question))

    @property
    def embedder_name(self) -> str:
        """What an index made with this engine records as its embedder."""
        return self.embedder.name or DEFAULT_EMBEDDER

    @property
    def adapter_folder(self) -> Path | None:
        """The folder of the adapter, None without one."""
        if self.load_model:
            return self.adapter
        return self.model.adapter.folder if self.model.adapter else None

    def gist_fingerprint(
        self, settings: IndexSettings, *, made_with: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Return everything that a gist depends on.

        Args:
            made_with: fingerprint of gists that are there already, see `gistrag.index.fingerprint`.
        """
        return gist_fingerprint(self.runtime, settings, made_with=made_with)


def _cpu_runtime(
    model: Path,
    adapter: Path | None,
    settings: IndexSettings,
    device: str | None,
    runtime: RuntimeName,
    calibration: Calibration | None,
) -> AnyRuntime | None:
    """Return the CPU runtime, or None where torch is wanted or needed."""
    is_cpu = device == "cpu" or (device is None and (runtime == "cpu" or not has_gpu()))
    if runtime == "torch" or not is_cpu:
        return None
    if model.suffix == ".gguf":
        converted(model)  # which torch needs as well, so no error about it is a reason to answer with torch
    try:
        if settings.quantize != "none":
            raise UnsupportedModelError(f"the CPU runtime has 8-bit weights of its own, not {settings.quantize}")
        from gistrag.model.cpu_conversion import open_cpu_runtime

        return open_cpu_runtime(model, adapter, traced=calibration.layers if calibration else ())
    except (UnsupportedModelError, ImportError, OSError, ResourceError, UsageError) as error:
        logger.warning("answering with torch, which is slower on a CPU: %s", error)
        return None
