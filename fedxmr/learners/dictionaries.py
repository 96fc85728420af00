"""Dictionaries with short columns, from sufficient statistics: min over D of |X - D Z|^2 with every |d_i| <= norm.

X enters only through `gram` A = Z Z' [k, k] and `cross` B = X Z' [d, k], so

    min over D of tr(D A D') - 2 tr(D B'),   |d_i|^2 <= c = norm^2.

Two solvers, of which one is enough and the other its check. Both are functions of the statistics alone: they start from
no previous solution, so whoever holds the same statistics gets the same dictionary. A and B times one factor give the
same. `JITTER` times A's mean diagonal is added to that diagonal, which makes the solution unique: the column of a dead
atom (a row of Z that is zero) is zero, and equal atoms share.

- `lagrange_dual` (Lee, Battle, Raina and Ng, NIPS 2006), as DLSL's eq. 5, 7 and 9 have it: D = B (A + L)^-1, where the
  diagonal L >= 0 maximises -tr(B (A + L)^-1 B') - c tr(L); by Newton steps projected on L >= 0 (Bertsekas, 1982).
- `coordinate_descent` (Mairal, Bach, Ponce and Sapiro, ICML 2009): column by column until none moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

JITTER = 1e-8

_TOLERANCE = 1e-12
_ROUNDING = 1e-14
_NEWTON_STEPS = 200
_FLAT_STEPS = 8
_SWEEPS = 2000


def lagrange_dual(gram: Tensor, cross: Tensor, norm: float) -> Tensor:
    """gram [k, k], cross [d, k], float64 -> D [d, k]; zero where the gram is."""
    gram = _regular(gram)
    if not bool(gram.any()):
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
    """D = B (A + L)^-1 at the L >= 0 that minimises f(L) = tr(B (A + L)^-1 B') + bound tr(L)."""
    scale = float(gram.diagonal().mean())

    def at(multipliers: Tensor) -> tuple[Tensor, Tensor, float]:
        """The factor of A + L, D and f."""
        factor = torch.linalg.cholesky(gram + multipliers.diag())
        found = torch.cholesky_solve(cross.T, factor).T
        return factor, found, float((cross * found).sum() + bound * multipliers.sum())

    multipliers = torch.full((len(gram),), scale, dtype=gram.dtype)
    factor, found, value = at(multipliers)
    flat = 0
    for _ in range(_NEWTON_STEPS):
        columns = found.T @ found
        slope = bound - columns.diagonal()
        resting = (multipliers <= _TOLERANCE * scale) & (slope > 0)
        free = (~resting).nonzero().flatten()
        # nearly singular, rounding may keep the slope from ever getting there
        if not len(free) or float(slope[free].abs().max()) <= _TOLERANCE * bound or flat == _FLAT_STEPS:
            break
        step = torch.zeros_like(multipliers)
        step[free] = _newton_step((columns * torch.cholesky_inverse(factor))[free][:, free], slope[free])
        length = 1.0
        while True:
            there = torch.where(resting, 0.0, multipliers - length * step).clamp(min=0)
            new_factor, new_found, new_value = at(there)
            least = 1e-4 * float(slope @ (multipliers - there))
            # close to the minimum f cannot tell a step from rounding; Newton's can be trusted there
            if new_value <= value - least + _ROUNDING * abs(value):
                break
            length /= 2
            if length < _TOLERANCE:
                return found
        flat = flat + 1 if new_value >= value - _ROUNDING * abs(value) else 0
        multipliers, factor, found, value = there, new_factor, new_found, new_value
    return found


def _newton_step(half_hessian: Tensor, slope: Tensor) -> Tensor:
    """[f, f] and [f] -> [f]. An atom that X does not depend on has no curvature: its multiplier goes to 0 at once."""
    hessian = 2 * half_hessian
    hessian.diagonal().add_(_TOLERANCE * float(hessian.diagonal().max()) + torch.finfo(hessian.dtype).tiny)
    step: Tensor = torch.linalg.solve(hessian, slope)
    return step
