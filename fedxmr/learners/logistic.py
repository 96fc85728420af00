"""Logistic regression in each modality, with the class probabilities as the common space: semantic matching.

Rasiwasia et al. (ACM Multimedia 2010): the classes are what modalities have in common, so each learns to name them
alone. Scikit-learn's multinomial regression, penalised by penalty/2 * ||W||^2 on top of the sum over items.

Decided here:
- an item of several classes counts for each of them in equal parts, so that a probability is the expected share of a
  class among an item's; an item of no class counts for nothing;
- two items rank by the chance that classes drawn for them are the same one, the product of their probabilities
  (`similarity`: or by the cosine);
- a class without an item gets a weight of 0 and a log-odds of -100; a modality with items of one class alone is not
  fitted, as nothing can be told apart in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from fedxmr.learners.cosine import cosine
from fedxmr.learners.projection import Affine, ProjectionLearner, View
from fedxmr.types import DataSpec, Items

_ABSENT = -100.0


class LogisticConfig(BaseModel):
    """Logistic regression's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    penalty: float = Field(
        10.0, gt=0, description="of the weights, against the sum over items: 1/C of scikit-learn, whose default is 1"
    )
    similarity: Literal["product", "cosine"] = Field("product", description="of two items' class probabilities")


class Logistic(ProjectionLearner):
    """The learner; its maps give log-odds, one for each class."""

    Config = LogisticConfig

    def __init__(self, config: LogisticConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        super().__init__(spec.num_classes, spec, device, rng)
        self._config = config

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d] features -> [n, C] float32 class probabilities, on the learner's device."""
        return self._project(modality, x).softmax(dim=1).float()

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:  # noqa: ARG002
        """Outputs of `encode`, [q, C] and [g, C] -> [q, g]."""
        return query @ gallery.T if self._config.similarity == "product" else cosine(query, gallery)

    def _solve(self, data: Items) -> tuple[Mapping[str, Affine], float] | None:
        """The loss: the mean over modalities of the mean cross-entropy of an item, without the penalty."""
        fitted = {m: regress(x, data.labels[data.rows[m]], self._config.penalty) for m, x in data.features.items()}
        found = {m: fit for m, fit in fitted.items() if fit is not None}
        return ({m: maps for m, (maps, _) in found.items()}, fmean(e for _, e in found.values())) if found else None


def regress(x: Tensor, labels: Tensor, penalty: float) -> tuple[Affine, float] | None:
    """The map to log-odds and the mean cross-entropy over the items with a class; None for fewer than two classes.

    x: [n, d]. labels: [n, C] bool.
    """
    # it takes a second to import
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    item, of = labels.nonzero().T
    share = 1 / labels.sum(1)[item].double()
    if len(of.unique()) < 2:
        return None
    view = View.of(x[item])  # far from zero it takes the solver very long
    with threadpool_limits(torch.get_num_threads()):
        found = LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=10_000).fit(
            view.x.cpu().numpy(), of.cpu().numpy(), share.cpu().numpy()
        )
    weight, bias = torch.from_numpy(found.coef_).double(), torch.from_numpy(found.intercept_).double()
    if len(weight) == 1:  # of two classes, the odds of the second against the first
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    there = torch.from_numpy(found.classes_)
    all_weights, odds = weight.new_zeros(labels.shape[1], x.shape[1]), bias.new_full((labels.shape[1],), _ABSENT)
    all_weights[there], odds[there] = weight, bias
    all_weights, odds = all_weights.to(x.device), odds.to(x.device)
    entropy = F.cross_entropy(F.linear(view.x, all_weights, odds), of, reduction="none")
    return Affine(all_weights, odds - all_weights @ view.mean), float((entropy * share).sum() / share.sum())
