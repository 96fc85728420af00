"""Cosine similarity that stays finite, with its gradient, where a row is zero."""

from __future__ import annotations

import torch
from torch import Tensor

_ZERO = 1e-6  # a row shorter than this has no direction


def unit_rows(x: Tensor) -> Tensor:
    """[n, k] -> [n, k], rows of length 1; a zero row stays zero, and no gradient flows into it."""
    squares = x.square().sum(dim=1, keepdim=True)
    zero = squares < _ZERO**2
    # The inner `where` keeps rsqrt's infinite derivative at 0 out of the graph: times the outer one's 0 it were NaN.
    return x * torch.where(zero, 0.0, torch.where(zero, 1.0, squares).rsqrt())


def cosine(query: Tensor, gallery: Tensor) -> Tensor:
    """[q, k] and [g, k] -> [q, g] cosines; 0 wherever either row is zero."""
    return unit_rows(query) @ unit_rows(gallery).T
