"""Rotary position embedding: turning a key to a position, and back.

A rotated key is the key turned by an angle proportional to its position (Su et al. 2021, arXiv 2104.09864), so a
key can be moved to another position without reading its text again. `Rope` holds the angles of one model, taken
from the model itself; it knows no cache and no network. The layers of some families turn their keys by angles of their
own, or not at all; the first axis of their keys then goes over the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """The angles by which one model turns its keys.

    Attributes:
        inv_freq: ``(head_dim / 2,)`` float32 or wider, radians per position of each pair of channels; or ``(layers,
            head_dim / 2)`` where layers differ, 0 in one that turns nothing.
        scaling: factor on cosine and sine (YaRN's attention scaling; 1 elsewhere).
    """

    inv_freq: Tensor
    scaling: float = 1.0

    @property
    def is_by_layer(self) -> bool:
        """Whether layers differ."""
        return self.inv_freq.ndim == 2

    def rotate(self, keys: Tensor, positions: Tensor, layers: Tensor | None = None) -> Tensor:
        """Return *keys* turned to *positions*, in float32 or wider.

        Rotating to position 0 is the identity (times `scaling`).

        Args:
            keys: ``(..., n, head_dim)``, un-rotated.
            positions: ``(..., n)``, any shape that broadcasts against the leading axes of *keys*.
            layers: the layer of each key, shape as *positions*; by default the first axis of *keys* goes over them.
        """
        cos, sin = self._tables(positions, self._layers(keys, layers))
        return _turn(_wide(keys), cos, sin)

    def unrotate(self, keys: Tensor, positions: Tensor, layers: Tensor | None = None) -> Tensor:
        """Return *keys* as they were before the model turned them to *positions*, in float32 or wider.

        The model rounds cosine and sine to its own dtype, which shortens or stretches the key a little; dividing by
        ``cos² + sin²`` of the same rounded tables undoes that and `scaling` at once.
        """
        cos, sin = (_wide(table.to(keys.dtype)) for table in self._tables(positions, self._layers(keys, layers)))
        return _turn(_wide(keys), cos, -sin) / _twice(cos**2 + sin**2)

    def rotate_products(self, products: Tensor, positions: Tensor) -> Tensor:
        """Return the sum of ``R products Rᵀ`` over the rotations *R* to all *positions*, ``(..., head_dim, head_dim)``.

        That is the sum of ``k kᵀ`` over rotated keys when *products* is that of keys as they are.

        Args:
            products: ``(..., head_dim, head_dim)``, the first axis over the layers where they differ.
            positions: ``(n,)``; ``R`` turns without `scaling`.
        """
        angles = positions[:, None].to(self.inv_freq.dtype) * self.inv_freq.unsqueeze(-2)
        if self.is_by_layer:
            angles = angles.view(len(self.inv_freq), *[1] * (products.ndim - 3), *angles.shape[1:])
        cos, sin = angles.cos(), angles.sin()
        cc, cs, sc, ss = (each.to(products.dtype) for each in (cos.mT @ cos, cos.mT @ sin, sin.mT @ cos, sin.mT @ sin))
        (a, b), (c, d) = (half.chunk(2, dim=-1) for half in products.chunk(2, dim=-2))
        upper = torch.cat((cc * a - cs * b - sc * c + ss * d, cs * a + cc * b - ss * c - sc * d), dim=-1)
        lower = torch.cat((sc * a - ss * b + cc * c - cs * d, ss * a + sc * b + cs * c + cc * d), dim=-1)
        return torch.cat((upper, lower), dim=-2)

    def _layers(self, keys: Tensor, layers: Tensor | None) -> Tensor | None:
        """Return the layer of each key, in a shape that broadcasts against positions; None where layers are alike."""
        if layers is not None or not self.is_by_layer:
            return layers
        return torch.arange(len(self.inv_freq), device=keys.device).view(-1, *[1] * (keys.ndim - 2))

    def _tables(self, positions: Tensor, layers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cosine and sine at *positions*, ``(..., n, head_dim / 2)``; on a CPU each is computed once."""
        if self.is_by_layer:
            angles = positions[..., None].to(self.inv_freq.dtype) * self.inv_freq[layers]
            return angles.cos() * self.scaling, angles.sin() * self.scaling
        places: Any = ...
        if positions.device.type == "cpu":
            positions, places = torch.unique(positions, return_inverse=True)
        angles = positions[..., None].to(self.inv_freq.dtype) * self.inv_freq
        return angles.cos()[places] * self.scaling, angles.sin()[places] * self.scaling


def _turn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = keys.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _twice(half: Tensor) -> Tensor:
    return torch.cat((half, half), dim=-1)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
