"""An adapter acts on questions and answers only, and loading it changes nothing for the rest of the process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gistrag.errors import ModelNotFoundError
from gistrag.model import adapter
from gistrag.settings import ADAPTER_FILE, AdapterSettings


def test_what_is_defined_meanwhile_is_compiled_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function decorated while peft is imported, by whatever thread, is compiled at its first call, once."""
    compiled: list[str] = []

    def compile_now(function, **options):  # type: ignore[no-untyped-def]
        compiled.append(f"{function.__name__} {options}")
        return lambda *given: ("compiled", *given)

    monkeypatch.setattr(torch, "compile", compile_now)
    with adapter._lazy_compilation():

        @torch.compile(dynamic=True)
        def scale(value):  # type: ignore[no-untyped-def]
            return value

    before = list(compiled)
    answers = [scale(1), scale(2)]

    assert before == []
    assert answers == [("compiled", 1), ("compiled", 2)]
    assert compiled == ["scale {'dynamic': True}"]
    assert torch.compile is compile_now


def saved(folder: Path, **changes: object) -> Path:
    """Write the settings of an adapter as version 0.1 wrote them."""
    values = {"base": "x", "placement": "matched", "rates": [4], "everywhere": False, **changes}
    (folder / ADAPTER_FILE).write_text(json.dumps(values), "utf-8")
    return folder


def test_settings_of_version_0_1_are_read(tmp_path: Path) -> None:
    """A setting that is gone and was off is passed over."""
    settings = AdapterSettings.read(saved(tmp_path))

    assert settings.placement == "matched"
    assert settings.index_placement == "matched"


def test_an_adapter_that_acts_on_text_is_refused(tmp_path: Path) -> None:
    """The experiment of version 0.1 would answer wrongly now, so it is named and refused."""
    with pytest.raises(ModelNotFoundError, match="act on text as well, which is no longer supported; train it again"):
        AdapterSettings.read(saved(tmp_path, everywhere=True))
