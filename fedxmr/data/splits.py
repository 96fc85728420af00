"""Dividing items into parts of exact sizes that keep the class proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def stratified_labels(labels: Tensor, sizes: Sequence[int], rng: Generator) -> list[Tensor]:
    """Divide items with several labels each into disjoint parts of exact sizes that keep the labels' proportions.

    Iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD 2011): the label with the fewest items left
    goes first, and each of its items to the part that still wants most of that label. Here a part that is full takes
    no more, and ties go to the part with most room, then to the earlier one.

    labels: [n, C] bool. sizes: of the parts, adding up to n. Returns one ascending int64 index per part.
    A label of a single item is in the largest part.
    """
    if sum(sizes) != len(labels):
        raise ValueError(f"sizes: expected a sum of {len(labels)}, got {list(sizes)}")
    room = torch.tensor(sizes)
    wanted = labels.sum(0) * room[:, None].double() / max(len(labels), 1)  # [parts, C]
    order = torch.randperm(len(labels), generator=rng)
    part = torch.full((len(labels),), -1)
    left = labels.sum(0)

    def assign(item: int, most: Tensor) -> None:
        """To the part whose `most` [parts] is largest, of those with room."""
        most = most.masked_fill(room == 0, -torch.inf)
        chosen = int(room.masked_fill(most < most.max(), -1).argmax())
        part[item] = chosen
        room[chosen] -= 1
        wanted[chosen, labels[item]] -= 1
        left[labels[item]] -= 1

    while left.any():
        rarest = int(left.masked_fill(left == 0, len(labels) + 1).argmin())
        for item in order[labels[order, rarest] & (part[order] < 0)].tolist():
            assign(item, wanted[:, rarest])
    for item in order[part[order] < 0].tolist():  # those without labels
        assign(item, room.double())
    return [(part == k).nonzero().flatten() for k in range(len(sizes))]


def first_copies(features: Mapping[str, Tensor]) -> Tensor:
    """[n] int64: for each of n complete items the first that has the same features in every modality, often itself.

    Published files hold some items twice; the copies must not be spread over several parts.
    """
    together = torch.cat([features[modality] for modality in sorted(features)], 1)
    _, group = torch.unique(together, dim=0, return_inverse=True)
    first = torch.full((len(group),), len(group)).scatter_reduce_(0, group, torch.arange(len(group)), "amin")
    return first[group]


def _proportional(counts: Tensor, size: int) -> Tensor:
    """Of `counts` [C] items take `size` in all, proportionally, by largest remainder; integers throughout."""
    total = max(int(counts.sum()), 1)
    share = counts * size // total
    remainder = counts * size % total
    short = size - int(share.sum())
    share[remainder.argsort(descending=True, stable=True)[:short]] += 1
    return share
