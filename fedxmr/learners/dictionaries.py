"""Dictionaries with short columns, from sufficient statistics: min over D of |X - D Z|^2 with every |d_i| <= norm.

X enters only through `gram` A = Z Z' [k, k] and `cross` B = X Z' [d, k], so

    min over D of tr(D A D') - 2 tr(D B'),   |d_i|^2 <= c = norm^2.

Two solvers, of which one is enough and the other its check. Both are functions of the statistics alone: they start from
no previous solution, so whoever holds the same statistics gets the same dictionary. A and B times one factor give the
same. `JITTER` times A's mean diagonal is added to that diagonal, which makes the solution unique: the column of a dead
atom (a row of Z that is zero) is zero, and equal atoms share.

- `lagrange_dual` (Lee, Battle, Raina and Ng, NIPS 2006), as DLSL's eq. 5, 7 and 9 have it: D = B (A + L)^-1, where the
  diagonal L >= 0 maximises -tr(B (A + L)^-1 B') - c tr(L); by a primal-dual interior point method (Wright, 1997), for
  Newton steps that are projected on L >= 0 may zigzag without end where atoms are more than X has dimensions.
- `coordinate_descent` (Mairal, Bach, Ponce and Sapiro, ICML 2009): column by column until none moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

JITTER = 1e-8

_TOLERANCE = 1e-12
_ROUNDING = 1e-14
_SETTLED = 1e-13
_NEWTON_STEPS = 100
_SWEEPS = 2000


def lagrange_dual(gram: Tensor, cross: Tensor, norm: float) -> Tensor:
    """gram [k, k], cross [d, k], float64 -> D [d, k]; zero where one of them is."""
    gram = _regular(gram)
    if not bool(gram.any()) or not bool(cross.any()):
        return torch.zeros_like(cross)
    # the constraint sees B'B alone: Newton's matrices are k x k, with a branch on each, which is nothing for a GPU.
    # A triangle with that B'B, since B'B itself squares the condition number.
    basis, triangle = torch.linalg.qr(cross)
    found = _dual(gram.cpu(), triangle.cpu(), norm**2)
    return project(basis @ found.to(cross.device), norm)


def coordinate_descent(gram: Tensor, cross: Tensor, norm: float) -> Tensor:
    """gram [k, k], cross [d, k], float64 -> D [d, k]. Slow where atoms are nearly equal, and 2000 sweeps at most."""
    gram = _regular(gram)
    found = torch.zeros_like(cross)
    for _ in range(_SWEEPS):
        moved = 0.0
        for j in gram.diagonal().nonzero().flatten().tolist():
            old = found[:, j].clone()
            column = old + (cross[:, j] - found @ gram[:, j]) / gram[j, j]
            found[:, j] = column * (norm / column.norm()).clamp(max=1)
            moved = max(moved, float((found[:, j] - old).abs().max()))
        if moved <= _TOLERANCE * norm:
            break
    return found


def project(dictionary: Tensor, norm: float) -> Tensor:
    """[d, k] with columns scaled down to `norm` where they are longer, by more than rounding: twice is once."""
    length = dictionary.norm(dim=0)
    return torch.where(length > norm * (1 + _TOLERANCE), dictionary * (norm / length), dictionary)


def residual(gram: Tensor, cross: Tensor, dictionary: Tensor, squares: Tensor) -> Tensor:
    """|X - D Z|^2, a scalar >= 0, from the statistics and squares = |X|^2."""
    fitted = ((dictionary @ gram - 2 * cross) * dictionary).sum()
    return (squares + fitted).clamp(min=0)


def _regular(gram: Tensor) -> Tensor:
    """A symmetric, positive definite copy. What averages and extrapolations of grams leave below 0 counts as 0."""
    gram = (gram + gram.T) / 2
    values, vectors = torch.linalg.eigh(gram)
    if float(values[0]) < 0:
        gram = (vectors * values.clamp(min=0)) @ vectors.T
    return gram + JITTER * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _dual(gram: Tensor, cross: Tensor, bound: float) -> Tensor:
    """D = B (A + L)^-1 at the L >= 0 that minimises f(L) = tr(B (A + L)^-1 B') + bound tr(L).

    f's slope by L_i is bound - |d_i|^2: at the minimum it is some S_i >= 0, and L_i S_i is 0. A Newton step is for
    both at once, kept above 0, with every L_i S_i a hundredth of their mean before.
    """
    multipliers = (cross.norm(dim=0) / bound**0.5).clamp(min=1e-3 * float(gram.diagonal().mean()))
    _, found, _ = _at(torch.zeros_like(multipliers), gram, cross, bound)
    if bool((found.square().sum(0) <= bound).all()):
        return found
    slack = torch.full_like(multipliers, bound)
    apart = float("inf")
    factor, found, value = _at(multipliers, gram, cross, bound)
    for _ in range(_NEWTON_STEPS):
        columns = found.T @ found
        slope = bound - columns.diagonal()
        before, apart = apart, float((slope - slack).abs().max())
        settled = bool((torch.minimum(slack / bound, multipliers / gram.diagonal()) <= _SETTLED).all())
        # where A is nearly singular, rounding keeps slope and slack apart
        if settled and (apart <= _TOLERANCE * bound or apart > before / 2):
            break
        target = float(multipliers @ slack) / len(gram) / 100
        hessian = 2 * columns * torch.cholesky_inverse(factor) + (slack / multipliers).diag()
        downhill = target / multipliers - slope
        step = _solve(hessian, downhill)
        slack_step = (target - slack * step) / multipliers - slack
        least = value - target * float(multipliers.log().sum())
        length = _room(multipliers, step)
        while True:
            there = multipliers + length * step
            factor, found, value = _at(there, gram, cross, bound)
            # close to the minimum f cannot tell a step from rounding; Newton's can be trusted there
            enough = least - 1e-4 * length * float(downhill @ step) + _ROUNDING * abs(value)
            if value - target * float(there.log().sum()) <= enough:
                break
            length /= 2
            if length < _TOLERANCE:
                return found
        multipliers, slack = there, slack + _room(slack, slack_step) * slack_step
    return found


def _at(multipliers: Tensor, gram: Tensor, cross: Tensor, bound: float) -> tuple[Tensor, Tensor, float]:
    """The Cholesky factor of A + L, D and f."""
    factor = torch.linalg.cholesky(gram + multipliers.diag())
    found = torch.cholesky_solve(cross.T, factor).T
    return factor, found, float((cross * found).sum() + bound * multipliers.sum())


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """[k, k] and [k] -> [k], for a positive definite matrix whose rows are of very different sizes."""
    scale = matrix.diagonal().rsqrt()
    scaled = scale[:, None] * matrix * scale
    scaled.diagonal().add_(_ROUNDING * len(matrix))
    return scale * torch.cholesky_solve((scale * right)[:, None], torch.linalg.cholesky(scaled))[:, 0]


def _room(values: Tensor, step: Tensor) -> float:
    """How much of a step, 1 at most, leaves values above 0 there."""
    return min(1.0, float(torch.where(step < 0, -0.995 * values / step, torch.inf).min()))
