"""Aligning the embeddings of two modalities: JFSE's three schemes and the two pairwise ones it is compared with.

CMMD (eq. 4), CMCA (eq. 6, 7, 10) and CMPM (eq. 11, 12) are of Xu, Lin, Yang, Hanjalic and Shen, TPAMI 2022. Departures:
- CMMD is minimised; the text says "maximize the mean discrepancy". Its kernels are TensorFlow's, as the paper says.
  The authors' code lifts it to 1e-4 at least, where its gradient ends; here it has no floor.
- CMCA divides by 4 s^2 with s the width of the embeddings, as in CORAL (Sun and Saenko, 2016); eq. 10 reuses the
  letter of the noise's width. Fewer than two rows have no covariance: 0.
- CMPM is +KL(p || q), as in Zhang and Lu (ECCV 2018) and in the authors' code; eq. 12 prints the opposite sign. A row
  that matches nothing across has no q and is left out of the mean, which only happens where items lack a modality.
- COR and TRIP have no equation in the paper. COR is the mean squared distance of an item's two embeddings; TRIP the
  mean over all triplets of the hinge max(0, margin + ||e - e+||^2 - ||e - e-||^2), in both directions: e+ shares a
  class with the anchor, e- none, both of the other modality. It takes n^3 numbers for a batch of n.

Below, a [n_a, s] and b [n_b, s] are the embeddings of two modalities and match [n_a, n_b] bool says which rows share a
class. All return scalars that are finite, with finite gradients, also for no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedxmr.learners.cosine import unit_rows

Scheme = Literal["cmpm", "cmmd", "cmca", "cor", "trip"]

SIGMAS = (
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    *(1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 100.0),
    *(1e3, 1e4, 1e5, 1e6),
)
"""The widths sigma_n of CMMD's 19 kernels; every weight eta_n is 1."""

EPSILON = 1e-8
"""Eq. 12's epsilon: what a match that q rules out costs, log 1e8 = 18.4 per unit of probability."""

MARGIN = 0.2
"""Of TRIP."""


class Pair(NamedTuple):
    """Two modalities of one batch; `common` has the rows of a and of b that belong to the same items, in order."""

    a: Tensor
    b: Tensor
    match: Tensor
    common: tuple[Tensor, Tensor]


def cmmd(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 4, the biased squared maximum mean discrepancy under the sum of the kernels exp(-d^2 / (2 sigma_n))."""
    if not len(a) or not len(b):
        return a.new_zeros(())
    x = torch.cat([a, b])
    gram = x @ x.T
    squares = gram.diagonal()  # of the same product, so that a row's distance to itself is 0 exactly
    distances = (squares[:, None] + squares - 2 * gram).clamp(min=0)
    rates = distances.new_tensor([-0.5 / sigma for sigma in SIGMAS])
    kernel = (distances[:, :, None] * rates).exp().sum(2)
    n = len(a)
    return kernel[:n, :n].mean() - 2 * kernel[:n, n:].mean() + kernel[n:, n:].mean()


def cmca(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 10, ||C_a - C_b||_F^2 / (4 s^2) of the covariances of eq. 6 and 7."""
    if len(a) < 2 or len(b) < 2:
        return a.new_zeros(())
    return (_covariance(a) - _covariance(b)).square().sum() / (4 * a.shape[1] ** 2)


def cmpm(a: Tensor, b: Tensor, match: Tensor) -> Tensor:
    """Eq. 12 in both directions, as a divergence: mean_i KL(p_i || q_i)."""
    return _projection(a, b, match) + _projection(b, a, match.T)


def cor(a: Tensor, b: Tensor) -> Tensor:
    """mean_i ||a_i - b_i||^2; a and b [n, s] belong to the same items."""
    return (a - b).square().sum() / max(len(a), 1)


def trip(a: Tensor, b: Tensor, match: Tensor) -> Tensor:
    """The mean hinge over all triplets, from a to b and from b to a."""
    distances = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)
    return _hinge(distances, match) + _hinge(distances.T, match.T)


SCHEMES: Mapping[Scheme, Callable[[Pair], Tensor]] = {
    "cmpm": lambda pair: cmpm(pair.a, pair.b, pair.match),
    "cmmd": lambda pair: cmmd(pair.a, pair.b),
    "cmca": lambda pair: cmca(pair.a, pair.b),
    "cor": lambda pair: cor(*pair.common),
    "trip": lambda pair: trip(pair.a, pair.b, pair.match),
}
"""The schemes by name."""


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _projection(query: Tensor, gallery: Tensor, match: Tensor) -> Tensor:
    """mean_i sum_j p_ij log(p_ij / (q_ij + epsilon)) over the rows i that match something; eq. 11 for p."""
    log_p = torch.log_softmax(query @ unit_rows(gallery).T, dim=1)
    matches = match.sum(1, keepdim=True)
    q = match.to(log_p.dtype) / matches.clamp(min=1)
    divergence = (log_p.exp() * (log_p - (q + EPSILON).log())).sum(1)
    has = matches[:, 0] > 0
    return (divergence * has).sum() / has.sum().clamp(min=1)


def _hinge(distances: Tensor, match: Tensor) -> Tensor:
    triplet = match[:, :, None] & ~match[:, None, :]
    hinge = (MARGIN + distances[:, :, None] - distances[:, None, :]).relu()
    return (hinge * triplet).sum() / triplet.sum().clamp(min=1)
