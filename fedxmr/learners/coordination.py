"""MCCN's coordination (Zeng, Sun and Mao, ACM MM 2021, eq. 3-9): padding, a random walk, and the batches of an epoch.

A modality with fewer embeddings than the richest one is padded class by class, and each padding embedding is replaced
by a real one that a step of a random walk leads to, drawn anew every epoch. Where the paper is silent or contradicts
itself:
- With eps = 1000 the walk goes to a real embedding of the wrong class (or of the same modality) with probability
  (R - deg) / (1000 deg + R - deg) for deg embeddings of the class elsewhere and R in all: 2 % for XMedia's 3D models,
  18 % for XMediaNet's videos. The default, eps = null, walks along edges only. A walk is one step; no more is said.
- H^z = Y^k - Y^z is read as the classes that modality k has more often, each as often as z lacks it.
- Each set of classes that an item has counts as a class of its own.
- Eq. 9 sends what replaces a padding embedding, another modality's features, through the padded modality's tower, whose
  width differs. `route: source` embeds it by its own tower and counts it in the padded modality's loss; `route: padded`
  is for features that are all filled up with zeros to the widest, as "a unified length" may mean.
- Batches: each modality spreads its embeddings evenly over an epoch's steps, the richest `batch_size` a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from fedxmr.types import Items

Route = Literal["source", "padded"]
"""Whose tower embeds what replaces a padding embedding."""


def padding(counts: Tensor) -> Tensor:
    """How many padding embeddings each modality gets of each class (eq. 3-4).

    counts [M, Q] int64: real embeddings. Modality k, the one with the most, is what the others are padded to.
    """
    richest = counts[counts.sum(1).argmax()]
    return (richest - counts).clamp(min=0)


def walk(modality: Tensor, category: Tensor, counts: Tensor, eps: float | None, rng: Generator) -> Tensor:
    """One step of the random walk from each of S padding embeddings (eq. 5-8) -> [S] int64, the real ones it reaches.

    modality, category [S]: of the padding. counts [M, Q]: real embeddings. An edge leads to the same category in
    another modality and is eps times as likely as no edge; eps None: edges only. Every padding embedding needs an edge.
    Real embeddings are numbered by category, then modality.
    """
    of_category = counts.sum(0)
    ends = counts.T.flatten().cumsum(0)
    own_end = ends[category * len(counts) + modality]
    own_start = own_end - counts[modality, category]
    end = of_category.cumsum(0)[category]
    start = end - of_category[category]
    edges = of_category[category] - counts[modality, category]
    others = int(counts.sum()) - edges

    # The edges are [start, own_start) and [own_end, end); no edge leads to the three intervals between and around.
    draw = torch.rand(len(category), generator=rng, dtype=torch.float64)
    near = start + (draw * edges).long().clamp(max=edges - 1)
    near += (own_end - own_start) * (near >= own_start)
    if eps is None:
        return near
    far = (draw * others).long().minimum((others - 1).clamp(min=0))
    far += (own_start - start) * (far >= start)
    far += (end - own_end) * (far >= own_end)
    follows = torch.rand(len(category), generator=rng, dtype=torch.float64) * (eps * edges + others) < eps * edges
    return torch.where(follows, near, far)


class Batch(NamedTuple):
    """The N embeddings of one step.

    parts: (tower, source, rows [n] int64): feature rows of the modality `source`, to go through a tower; N in all.
    classes [N, C] bool. modality [N] int64: by position, the one in whose loss each counts; not its source if it is
    a replacement. weight [N] float: 1 / the number that count there, so a weighted sum is a sum of means.
    """

    parts: list[tuple[str, str, Tensor]]
    classes: Tensor
    modality: Tensor
    weight: Tensor


class Samples:
    """A client's embeddings, real and padding, and how they fall into batches. All planning is on the CPU."""

    def __init__(
        self,
        data: Items,
        batch_size: int,
        *,
        coordinate: bool = True,
        route: Route = "source",
        eps: float | None = None,
    ) -> None:
        """data: items with at least one class each, at least one modality.

        batch_size: embeddings of the richest modality per step. coordinate: whether there is padding.
        """
        self.modalities = data.modalities
        self._batch_size, self._route, self._eps = batch_size, route, eps
        self._device = data.labels.device
        sets, of_item = torch.unique(data.labels.cpu(), dim=0, return_inverse=True)
        self._classes = sets.to(self._device)
        categories = [of_item[data.rows[m].cpu()] for m in self.modalities]
        sizes = torch.tensor([len(c) for c in categories])
        category = torch.cat(categories)
        source = torch.arange(len(sizes)).repeat_interleave(sizes)
        row = torch.cat([torch.arange(len(c)) for c in categories])
        order = (category * len(sizes) + source).argsort(stable=True)
        self._category, self._source, self._row = category[order], source[order], row[order]
        self._counts = torch.stack([c.bincount(minlength=len(sets)) for c in categories])
        lacking = padding(self._counts) if coordinate else torch.zeros_like(self._counts)
        slots = lacking.flatten()
        self.padded = torch.arange(len(sizes)).repeat_interleave(len(sets)).repeat_interleave(slots)
        self._padded_category = torch.arange(len(sets)).repeat(len(sizes)).repeat_interleave(slots)

    def epoch(self, rng: Generator) -> Iterator[Batch]:
        """Every real embedding once, and a new replacement for every padding one."""
        m = len(self.modalities)
        drawn = walk(self.padded, self._padded_category, self._counts, self._eps, rng)
        source = torch.cat([self._source, self._source[drawn]])
        row = torch.cat([self._row, self._row[drawn]])
        category = torch.cat([self._category, self._padded_category])
        modality = torch.cat([self._source, self.padded])
        tower = source if self._route == "source" else modality

        step, steps = self._steps(modality, rng)
        part = (step * m + tower) * m + source
        order = part.argsort(stable=True)
        counted = step * m + modality
        weight = (1 / counted.bincount())[counted]
        row, category, modality, weight = (t[order].to(self._device) for t in (row, category, modality, weight))
        at = 0
        for sizes in part.bincount(minlength=steps * m * m).reshape(steps, m * m).tolist():
            parts, start = [], at
            for i, size in enumerate(sizes):
                if size:
                    parts.append((self.modalities[i // m], self.modalities[i % m], row[at : at + size]))
                    at += size
            yield Batch(parts, self._classes[category[start:at]], modality[start:at], weight[start:at])

    def _steps(self, modality: Tensor, rng: Generator) -> tuple[Tensor, int]:
        """The step each embedding is drawn into, [T], and the number of steps: each modality's spread evenly."""
        members = [(modality == z).nonzero().flatten() for z in range(len(self.modalities))]
        steps = -(-max(map(len, members)) // self._batch_size)
        step = torch.empty_like(modality)
        for of in members:
            step[of[torch.randperm(len(of), generator=rng)]] = torch.arange(len(of)) * steps // len(of)
        return step, steps
