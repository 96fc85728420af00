"""What zero-shot scores are to be judged against: chance, the cosine of untrained features, ridge to class vectors.

None of them sees an item of an unseen class before it is asked, and all are measured like a model: same queries, same
galleries, same ties.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedxmr.evaluation import average, evaluate, key
from fedxmr.learners.cosine import cosine, unit_rows
from fedxmr.metrics import relevance
from fedxmr.types import DataSpec, Items
from fedxmr.zero_shot import Protocol, Task, evaluate_task, judged

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Of the ridge regression; the one that is best on the validation items of seen classes counts."""

Scores = dict[str, float]


def chance_precision(relevant: Tensor, gallery: int) -> Tensor:
    """The expected average precision of a random ranking.

    relevant: [q] how many of the gallery's items are; 1 or more. Returns [q] float64.

    An item is at rank k with probability 1 / g, and (k - 1) (r - 1) / (g - 1) of those before it are relevant then.
    """
    ranks = torch.arange(1, gallery + 1, dtype=torch.float64)
    harmonic = (1 / ranks).sum()
    others = (relevant.double() - 1) / max(gallery - 1, 1)
    return (harmonic + others * (gallery - harmonic)) / gallery


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights [d, k] and intercept [k] float64 least in sum ||y - x W - b||^2 + penalty ||W||^2; x [n, d], y [n, k]."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device), x.T @ y)
    return weights, mean_y - mean_x @ weights


@dataclass(frozen=True)
class RawCosine:
    """Features as they are, compared by their cosine."""

    def encode(self, modality: str, x: Tensor) -> Tensor:  # noqa: ARG002
        """The features themselves."""
        return x

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:  # noqa: ARG002
        """Cosines."""
        return cosine(query, gallery)


@dataclass(frozen=True)
class RidgeToClassVectors:
    """A linear map for each modality to the class vectors, whose cosine is compared. maps: modality -> (W, b)."""

    maps: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def fitted(cls, train: Items, class_vectors: Tensor, penalty: float) -> RidgeToClassVectors:
        """Ridge regression of each item's class vector, of length 1 (the mean of them for several classes)."""
        share = train.labels.double() / train.labels.sum(1, keepdim=True)
        targets = share @ unit_rows(class_vectors.double())
        return cls({m: ridge(train.features[m], targets[train.rows[m]], penalty) for m in train.modalities})

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d_m] -> [n, k] float64, beside the class vectors."""
        weights, intercept = self.maps[modality]
        return x.double() @ weights + intercept

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:  # noqa: ARG002
        """Cosines."""
        return cosine(query, gallery)


def chance(protocol: Protocol) -> dict[Task, Scores]:
    """The expected mAP of random rankings, by task and direction."""
    found = {}
    for task, ranked in protocol.tasks.items():
        by_direction = {}
        for direction, (queries, gallery) in judged(protocol.train, protocol.test, ranked).items():
            relevant = relevance(queries, gallery).sum(1)
            by_direction[key(direction)] = float(chance_precision(relevant[relevant > 0], len(gallery)).mean())
        found[task] = average(by_direction)
    return found


def raw_cosine(protocol: Protocol, spec: DataSpec, seed: int) -> dict[Task, Scores] | None:
    """The scores of the features themselves; None where modalities differ in width. Of raw or of scaled items."""
    if len(set(spec.dims.values())) > 1:
        return None
    return {
        task: evaluate_task(RawCosine(), protocol.train, protocol.test, r, seed) for task, r in protocol.tasks.items()
    }


def ridge_to_class_vectors(
    protocol: Protocol, train: Items, validation: Items, spec: DataSpec, seed: int
) -> dict[Task, Scores] | None:
    """The scores of ridge regression on the seen training items; None without class vectors.

    protocol, train, validation: of scaled items, the latter two of seen classes.
    """
    if spec.class_vectors is None:
        return None
    vectors = spec.class_vectors
    fitted = [RidgeToClassVectors.fitted(train, vectors, penalty) for penalty in PENALTIES]
    best = max(fitted, key=lambda model: evaluate(model, validation, seed)["average"])
    return {task: evaluate_task(best, protocol.train, protocol.test, r, seed) for task, r in protocol.tasks.items()}
