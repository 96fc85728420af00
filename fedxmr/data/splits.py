"""Dividing items into parts of exact sizes that keep the class proportions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def stratified(classes: Tensor, sizes: Sequence[int], rng: Generator) -> list[Tensor]:
    """Divide n items into disjoint parts in which every class has its share, rounded to a neighbouring integer.

    classes: [n] int64, the class of each item. sizes: of the parts, adding up to n.
    Returns one ascending int64 index per part. Ties in the rounding go to the lower class numbers.
    """
    if sum(sizes) != len(classes):
        raise ValueError(f"sizes: expected a sum of {len(classes)}, got {list(sizes)}")
    parts = []
    left = torch.randperm(len(classes), generator=rng)
    for size in sizes:
        counts = torch.bincount(classes[left])
        share = _proportional(counts, size)
        by_class = left[classes[left].argsort(stable=True)].split_with_sizes(counts.tolist())
        parts.append(torch.cat([c[:k] for c, k in zip(by_class, share.tolist(), strict=True)]).sort().values)
        left = torch.cat([c[k:] for c, k in zip(by_class, share.tolist(), strict=True)])
    return parts


def _proportional(counts: Tensor, size: int) -> Tensor:
    """Of `counts` [C] items take `size` in all, proportionally, by largest remainder; integers throughout."""
    total = max(int(counts.sum()), 1)
    share = counts * size // total
    remainder = counts * size % total
    short = size - int(share.sum())
    share[remainder.argsort(descending=True, stable=True)[:short]] += 1
    return share
