"""CCA, MCCA and PLS: projections under which the modalities of one item go together. They look at no label.

CCA: canonical correlation analysis (Hotelling, Biometrika 1936), for cross-modal retrieval by Rasiwasia et al. (ACM
Multimedia 2010). MCCA: its extension to any number of modalities by the sum of correlations (SUMCOR; Kettenring,
Biometrika 1971) with the one constraint that makes it an eigenproblem (Nielsen, IEEE TIP 2002):

    maximise sum over pairs a != b of w_a^T S_ab w_b    subject to    sum over a of w_a^T (S_aa + ridge m_a I) w_a = 1

where m_a is the mean variance of a's columns; of two modalities this is regularised CCA. PLS: the same with
w_a^T w_a in place of the variance, so that covariance and not correlation counts (the singular vectors of S_ab:
scikit-learn's PLSSVD); of two modalities.

Solved in closed form, in principal axes: scikit-learn's CCA is iterative, has no ridge, and is slow and unstable where
columns are many. Directions without variance count for nothing, so constant columns and fewer items than columns do
no harm; but then a ridge of 0 finds correlations of 1 that mean nothing.

Items that have two modalities or more are what is fitted to, and S_ab is of those that have both. Decided here: with
three modalities or more no item needs to have all of them, so correlations of different pairs can come from different
items, and may contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from fedxmr.learners.projection import Affine, ProjectionLearner, View, leading
from fedxmr.types import DataSpec, Items


class PLSConfig(BaseModel):
    """PLS's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    components: int = Field(
        10, ge=1, le=1 << 20, description="axes of the common space; those beyond the data's rank are zero"
    )


class CCAConfig(PLSConfig):
    """CCA's and MCCA's options."""

    ridge: float = Field(
        0.01, ge=0, description="added to every variance, as a part of the modality's mean variance; 0: plain CCA"
    )


def correlate(data: Items, bases: Mapping[str, Tensor], views: Mapping[str, View]) -> tuple[dict[str, Tensor], Tensor]:
    """The axes along which pairs of modalities vary together, and by how much, in the mean over pairs.

    bases: modality -> [d, r_m], in which an axis of all modalities has length 1. Returns modality -> [d, r], and [r].
    """
    seen, ranks = list(bases), [basis.shape[1] for basis in bases.values()]
    scores = {m: views[m].x @ basis for m, basis in bases.items()}
    between = scores[seen[0]].new_zeros(sum(ranks), sum(ranks))
    block = dict(zip(seen, torch.split(torch.arange(sum(ranks), device=between.device), ranks), strict=True))
    for a, b in combinations(seen, 2):
        in_a, in_b = torch.isin(data.rows[a], data.rows[b]), torch.isin(data.rows[b], data.rows[a])
        if in_a.any():
            covariance = scores[a][in_a].T @ scores[b][in_b] / in_a.sum()
            between[block[a][:, None], block[b]] = covariance
            between[block[b][:, None], block[a]] = covariance.T
    values, vectors = torch.linalg.eigh(between)
    return {m: basis @ vectors[block[m]] for m, basis in bases.items()}, values / (len(seen) - 1)


def solve(data: Items, components: int, basis: Callable[[View], Tensor]) -> tuple[Mapping[str, Affine], float] | None:
    """The maps and the loss: 1 less the mean weight of the axes found. None where nothing varies together."""
    modalities = torch.zeros(len(data), dtype=torch.int64, device=data.labels.device)
    for rows in data.rows.values():
        modalities[rows] += 1
    data = data.select((modalities > 1).nonzero().flatten())
    views = {m: View.of(data.features[m]) for m in data.modalities}
    if not views:
        return None
    axes, weights = correlate(data, {m: basis(view) for m, view in views.items()}, views)
    found = leading(axes, weights, components, views)
    return (found[0], max(1 - float(found[1].mean()), 0.0)) if found else None


class MCCA(ProjectionLearner):
    """The learner of any number of modalities."""

    Config = CCAConfig
    least = 2

    def __init__(self, config: CCAConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        super().__init__(config.components, spec, device, rng)
        self._config = config

    def _solve(self, data: Items) -> tuple[Mapping[str, Affine], float] | None:
        return solve(data, self._config.components, lambda view: view.whitener(self._config.ridge))


class CCA(ProjectionLearner):
    """The learner of two modalities, where MCCA is CCA."""

    Config = CCAConfig
    least = most = 2

    def __init__(self, config: CCAConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        super().__init__(config.components, spec, device, rng)
        self._config = config

    def _solve(self, data: Items) -> tuple[Mapping[str, Affine], float] | None:
        return solve(data, self._config.components, lambda view: view.whitener(self._config.ridge))


class PLS(ProjectionLearner):
    """The learner of two modalities that goes by covariance."""

    Config = PLSConfig
    least = most = 2

    def __init__(self, config: PLSConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        super().__init__(config.components, spec, device, rng)
        self._config = config

    def _solve(self, data: Items) -> tuple[Mapping[str, Affine], float] | None:
        return solve(data, self._config.components, View.rotation)
