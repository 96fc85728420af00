"""Two ways to solve for a dictionary: they agree, also where atoms are dead, equal, or more than X has dimensions."""

from __future__ import annotations

import pytest
import torch

from fedxmr.learners.dictionaries import JITTER, coordinate_descent, lagrange_dual, project, residual
from fedxmr.seeding import generator

SOLVERS = [lagrange_dual, coordinate_descent]


def problem(d=30, k=8, n=60, size=1.0, seed=0):
    """X [d, n] of about that size beside dictionaries with columns of length 1, and Z [k, n]."""
    g = generator(seed, "problem")
    z = torch.randn(k, n, generator=g, dtype=torch.float64)
    d_true = torch.randn(d, k, generator=g, dtype=torch.float64)
    x = size * (d_true / d_true.norm(dim=0) @ z + 0.3 * torch.randn(d, n, generator=g, dtype=torch.float64))
    return x, z


def dead(z):
    z[3] = 0
    return z


def equal(z):
    z[3] = z[5]
    return z


def nearly_equal(z):
    z[3] = z[5] + 1e-6 * torch.randn(z.shape[1], generator=generator(9, "x"), dtype=torch.float64)
    return z


def value(x, z, dictionary):
    return float((x - dictionary @ z).square().sum())


@pytest.mark.parametrize("norm", [1.0, 0.1])
@pytest.mark.parametrize("size", [0.3, 1.0, 5.0], ids=["slack", "mixed", "tight"])
@pytest.mark.parametrize("shape", [(30, 8, 60), (3, 8, 60), (1, 1, 5), (50, 20, 25)], ids=str)
@pytest.mark.parametrize("spoil", [lambda z: z, lambda z: dead(z) if len(z) > 3 else z], ids=["all alive", "one dead"])
def test_the_dual_and_block_coordinate_descent_agree(shape, size, norm, spoil):
    x, z = problem(*shape, size=size)
    z = spoil(z)
    one, other = (solve(z @ z.T, x @ z.T, norm) for solve in SOLVERS)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)
    assert float(one.norm(dim=0).max()) <= norm * (1 + 1e-10)


def test_the_sizes_above_are_with_all_some_and_no_columns_shorter_than_they_may_be():
    shorter = []
    for size in (0.3, 1.0, 5.0):
        x, z = problem(size=size)
        shorter.append(int((lagrange_dual(z @ z.T, x @ z.T, 1.0).norm(dim=0) < 1 - 1e-6).sum()))
    assert shorter[0] == 8
    assert 0 < shorter[1] < 8
    assert shorter[2] == 0


def test_where_the_bound_does_not_bind_it_is_least_squares():
    x, z = problem(size=0.3)
    exact = torch.linalg.lstsq(z.T, x.T).solution.T
    torch.testing.assert_close(lagrange_dual(z @ z.T, x @ z.T, 1.0), exact, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [0.3, 5.0])
@pytest.mark.parametrize("n", [1, 5, 60])
@pytest.mark.parametrize("d", [3, 30])
def test_with_equal_atoms_few_items_or_few_dimensions_both_reach_the_minimum(d, n, size):
    x, z = problem(d=d, n=n, size=size)
    z = equal(z)
    values = [value(x, z, solve(z @ z.T, x @ z.T, 1.0)) for solve in SOLVERS]
    assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-6 * float(x.square().sum()))


@pytest.mark.parametrize("norm", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 20, 30), (2, 40, 30), (6, 20, 3), (100, 20, 5)], ids=str)
@pytest.mark.parametrize("spoil", [equal, nearly_equal, dead, lambda z: z.abs() + 3])
def test_the_dual_is_at_the_optimum_where_atoms_are_more_than_dimensions_or_items(shape, norm, spoil):
    x, z = problem(*shape, seed=5)  # with which steps projected on L >= 0 zigzag where two of 20 are nearly equal
    z = spoil(z)
    found = lagrange_dual(z @ z.T, x @ z.T, norm)
    length = found.norm(dim=0)
    # least cost: the fall that is left is along columns that have their full length, and outward
    fall = x @ z.T - found @ (z @ z.T + JITTER * (z @ z.T).diagonal().mean() * torch.eye(len(z)))
    outward = (fall * found).sum(0) / length.clamp(min=1e-12)
    rest = (fall - outward * found / length.clamp(min=1e-12)).norm(dim=0)
    size = float((x @ z.T).norm(dim=0).max())
    assert float(rest.max()) < 1e-6 * size
    assert float(outward.min()) > -1e-6 * size
    assert float((outward * (norm - length)).abs().max()) < 1e-6 * size * norm


@pytest.mark.parametrize("norm", [1.0, 1000.0])
def test_features_that_are_all_zero_have_a_dictionary_of_zeros(norm):
    _, z = problem()
    assert not any(solve(z @ z.T, torch.zeros(5, len(z)).double(), norm).any() for solve in SOLVERS)


@pytest.mark.parametrize("solve", SOLVERS)
def test_the_column_of_a_dead_atom_is_zero(solve):
    x, z = problem()
    z = dead(z)
    found = solve(z @ z.T, x @ z.T, 1.0)
    assert not found[:, 3].any()
    assert (found.norm(dim=0) > 0).sum() == 7
    assert not solve(0 * z @ z.T, 0 * x @ z.T, 1.0).any()


@pytest.mark.parametrize("solve", SOLVERS)
def test_statistics_times_a_factor_have_the_same_solution(solve):
    x, z = problem()
    once = solve(z @ z.T, x @ z.T, 1.0)
    torch.testing.assert_close(solve(z @ z.T / 4096, x @ z.T / 4096, 1.0), once, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solve", SOLVERS)
def test_a_gram_that_extrapolation_left_below_zero_gives_a_finite_dictionary(solve):
    x, z = problem()
    gram = z @ z.T
    gram[0, 0] = -gram[0, 0]
    found = solve(gram, x @ z.T, 1.0)
    assert bool(torch.isfinite(found).all())
    assert float(found.norm(dim=0).max()) <= 1 + 1e-10


@pytest.mark.parametrize("solve", SOLVERS)
def test_no_feasible_dictionary_is_better(solve):
    x, z = problem()
    found = solve(z @ z.T, x @ z.T, 1.0)
    g = generator(1, "neighbours")
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(50):
            other = project(found + size * torch.randn(found.shape, generator=g, dtype=torch.float64), 1.0)
            assert value(x, z, other) > value(x, z, found)


def test_projecting_twice_is_projecting_once_to_the_bit():
    g = generator(0, "columns")
    for norm in (1.0, 0.1, 3.0):
        columns = torch.randn(7, 200, generator=g, dtype=torch.float64)
        once = project(columns, norm)
        assert torch.equal(project(once, norm), once)
        short = columns.norm(dim=0) <= norm
        assert torch.equal(once[:, short], columns[:, short])
        torch.testing.assert_close(once.norm(dim=0)[~short], torch.full((int((~short).sum()),), norm).double())


def test_the_residual_from_statistics_is_that_of_the_items():
    x, z = problem()
    dictionary = project(torch.randn(30, 8, generator=generator(2, "d"), dtype=torch.float64), 1.0)
    ours = residual(z @ z.T, x @ z.T, dictionary, x.square().sum())
    assert float(ours) == pytest.approx(value(x, z, dictionary))
