"""A GPU where there is none: tensors that say they are elsewhere, and operations that refuse to mix them with others.

Inside of `a_gpu`, a tensor of device ``meta`` holds numbers of its own, which are computed on the CPU. What PyTorch
refuses between a CPU and a GPU is refused here: an operation on tensors of both. Speed and kernels are not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")
MOVES = {"_to_copy", "copy_"}
TAKES_PLACES_OF_THE_CPU = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor that says it is on another device; its numbers are in `held`, on the CPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        """Return *held* as if it were elsewhere."""
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=ELSEWHERE, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return _computed(operation, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what is made as well."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operation, args, kwargs or {})


@contextmanager
def a_gpu() -> Iterator[torch.device]:
    """Yield a device that is not the CPU."""
    with patch("torch.tensor", _tensor), _Mode():
        yield ELSEWHERE


_plain_tensor = torch.tensor


def _tensor(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
    """Return a tensor; torch makes those of the meta device without asking anybody."""
    made = _plain_tensor(data, dtype=dtype, **kwargs)
    return made if device is None else made.to(device)


def _computed(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = operation.__name__.split(".")[0]
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    elsewhere = [one for one in given if isinstance(one, Elsewhere)]
    here = [one for one in given if not isinstance(one, Elsewhere) and one.dim() > 0]
    if elsewhere and here and name not in MOVES and not _is_allowed(name, args):
        shapes = [[tuple(one.shape) for one in ones] for ones in (here, elsewhere)]
        raise RuntimeError(f"expected tensors of one device for {name}, got {shapes[0]} here and {shapes[1]} elsewhere")
    goes = bool(elsewhere) if name != "copy_" else isinstance(args[0], Elsewhere)
    if (device := kwargs.get("device")) is not None:
        goes, kwargs = torch.device(device) == ELSEWHERE, {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map(lambda one: one.held if isinstance(one, Elsewhere) else one, (args, kwargs))
    made = operation(*plain_args, **plain_kwargs)
    if name.endswith("_") and not name.startswith("_"):  # in place
        return args[0]
    return tree_map(lambda one: Elsewhere(one) if goes and isinstance(one, Tensor) else one, made)


def _is_allowed(name: str, args: Any) -> bool:
    """Return whether places of the CPU are used for numbers that are elsewhere, which a GPU allows."""
    return name in TAKES_PLACES_OF_THE_CPU and isinstance(args[0], Elsewhere)
