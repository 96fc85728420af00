"""What neural learners share: batches, states, optimisers, the loss of a stage."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from fedxmr.errors import InputError
from fedxmr.learners import LEARNERS, learner_class
from fedxmr.learners.cosine import cosine, unit_rows
from fedxmr.learners.training import (
    Losses,
    Network,
    OptimizerConfig,
    batches,
    layers,
    linear,
    products_in,
    restore,
    snapshot,
)
from fedxmr.seeding import generator
from fedxmr.types import Proximal

CPU = torch.device("cpu")


def network(keep_optimizer=True, **optimizer):
    g = generator(0, "network")
    parameters = {"a.weight": torch.randn(3, 2, generator=g), "a.bias": torch.randn(3, generator=g)}
    return Network(parameters, OptimizerConfig(**optimizer), keep_optimizer)


def bowl(net):
    """A loss whose slope at w is w - 1."""
    return sum(((p - 1) ** 2).sum() for p in net.parameters.values()) / 2


def test_batches_cover_every_item_once_and_keep_the_small_last_one():
    found = list(batches(7, 3, generator(0, "b"), CPU))
    assert [len(b) for b in found] == [3, 3, 1]
    assert sorted(torch.cat(found).tolist()) == list(range(7))
    assert torch.cat(found).tolist() == torch.cat(list(batches(7, 3, generator(0, "b"), CPU))).tolist()
    assert torch.cat(found).tolist() != torch.cat(list(batches(7, 3, generator(1, "b"), CPU))).tolist()


def test_batches_in_order_and_of_nothing():
    assert [b.tolist() for b in batches(3, 2, generator(0, "b"), CPU, shuffle=False)] == [[0, 1], [2]]
    assert list(batches(0, 2, generator(0, "b"), CPU)) == []


def test_linear_draws_within_torchs_own_bounds():
    weight, bias = linear(16, 2000, generator(0, "l"), CPU)
    reference = torch.nn.Linear(16, 2000)
    for ours, theirs in ((weight, reference.weight), (bias, reference.bias)):
        assert ours.shape == theirs.shape
        assert 0.24 < float(ours.abs().max()) <= 0.25
        assert float(ours.std()) == pytest.approx(0.25 / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_torchs_fused_adam_bit_by_bit(decay):
    net = network(lr=0.01, weight_decay=decay)
    theirs = {name: p.detach().clone().requires_grad_() for name, p in net.parameters.items()}
    adam = torch.optim.Adam(theirs.values(), lr=0.01, betas=(0.5, 0.999), weight_decay=decay, fused=True)
    for _ in range(5):
        with net.training() as step:
            step(bowl(net))
        adam.zero_grad()
        (sum(((p - 1) ** 2).sum() for p in theirs.values()) / 2).backward()
        adam.step()
    state = snapshot(net.live())
    for name, p in theirs.items():
        assert torch.equal(state[name], p)
        assert torch.equal(state[f"optimizer.exp_avg.{name}"], adam.state[p]["exp_avg"])
        assert torch.equal(state[f"optimizer.exp_avg_sq.{name}"], adam.state[p]["exp_avg_sq"])
        assert torch.equal(state[f"optimizer.step.{name}"], adam.state[p]["step"])


def test_sgd_steps_down_the_slope_and_has_no_moments():
    net = network(name="sgd", lr=0.1, weight_decay=0.5)
    assert set(net.live()) == {"a.weight", "a.bias"}
    start = snapshot(net.live())
    with net.training() as step:
        step(bowl(net))
    for name, w in snapshot(net.live()).items():
        torch.testing.assert_close(w, start[name] - 0.1 * (start[name] - 1 + 0.5 * start[name]))


def test_fedprox_pulls_upward_from_below_the_anchor():
    net = network(name="sgd", lr=0.1)
    start = snapshot(net.live())
    with net.training(Proximal(2.0, {"a.bias": start["a.bias"] + 3})) as step:
        step(bowl(net))
    after = snapshot(net.live())
    torch.testing.assert_close(after["a.bias"], start["a.bias"] - 0.1 * (start["a.bias"] - 1 - 2 * 3))
    torch.testing.assert_close(after["a.weight"], start["a.weight"] - 0.1 * (start["a.weight"] - 1))


@pytest.mark.parametrize("anchor", [{"b.bias": torch.zeros(3)}, {"a.bias": torch.zeros(1)}])
def test_an_anchor_of_something_else_is_refused(anchor):
    with pytest.raises(ValueError, match="anchor: "), network().training(Proximal(1.0, anchor)):
        pass


def test_a_parameter_outside_the_loss_rests():
    net = network(weight_decay=0.1)
    start = snapshot(net.live())
    with net.training(Proximal(1.0, {"a.bias": start["a.bias"] + 1})) as step:
        step(net.parameters["a.weight"].square().sum())
    after = snapshot(net.live())
    assert torch.equal(after["a.bias"], start["a.bias"])
    assert after["optimizer.step.a.bias"] == 0
    assert after["optimizer.step.a.weight"] == 1


def test_the_names_of_the_state_are_the_same_before_the_first_step():
    net = network()
    before = snapshot(net.live())
    with net.training() as step:
        step(bowl(net))
    after = snapshot(net.live())
    assert before.keys() == after.keys()
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}


def test_an_optimizer_that_is_not_kept_starts_every_stage_afresh():
    net = network(keep_optimizer=False)
    assert set(net.live()) == {"a.weight", "a.bias"}
    ends = []
    for _ in range(2):
        restore(net.live(), {"a.weight": torch.zeros(3, 2), "a.bias": torch.zeros(3)})
        with net.training() as step:
            for _ in range(3):
                step(bowl(net))
        ends.append(snapshot(net.live()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_no_gradient_outlives_a_stage_even_one_that_fails():
    net = network()
    with pytest.raises(RuntimeError, match="stop"), net.training() as step:
        step(bowl(net))
        assert net.parameters["a.bias"].grad is not None
        raise RuntimeError("stop")
    assert all(p.grad is None for p in net.parameters.values())


def test_a_snapshot_and_a_restored_state_are_copies():
    net = network()
    state = snapshot(net.live())
    state["a.bias"].fill_(7)
    assert not (net.parameters["a.bias"] == 7).any()
    parameter = net.parameters["a.bias"]
    restore(net.live(), state)
    state["a.bias"].fill_(8)
    assert net.parameters["a.bias"] is parameter
    assert (parameter == 7).all()
    assert parameter.requires_grad


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("b.weight", torch.zeros(3, 2)),
        ("a.weight", torch.zeros(2, 3)),
        ("a.weight", torch.zeros(3, 2, dtype=torch.float64)),
        ("optimizer.step.a.weight", torch.zeros(1)),
    ],
)
def test_a_wrong_state_is_named_and_nothing_of_it_is_loaded(name, value):
    net = network()
    before = snapshot(net.live())
    with pytest.raises(ValueError, match=name):
        restore(net.live(), {"a.bias": torch.full((3,), 9.0), name: value})
    assert all(torch.equal(before[k], t) for k, t in snapshot(net.live()).items())


def test_the_loss_is_the_mean_per_item_and_the_sum_over_batches():
    losses = Losses(CPU)
    losses.add(torch.tensor(2.0, requires_grad=True), 3)
    losses.add(torch.tensor(6.0), 1)
    fit = losses.fit()
    assert (fit.loss, fit.loss_sum, fit.trained) == (3.0, 8.0, True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_reported(bad):
    losses = Losses(CPU)
    losses.add(torch.tensor(bad), 3)
    losses.add(torch.tensor(1.0), 3)
    assert not math.isfinite(losses.fit().loss)
    assert not math.isfinite(losses.fit().loss_sum)


def test_no_batch_is_no_training():
    fit = Losses(CPU).fit()
    assert (fit.loss, fit.loss_sum, fit.trained) == (0.0, 0.0, False)


def test_cosine_with_and_of_zero_rows():
    query = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1e-20, 0.0]])
    gallery = torch.tensor([[6.0, 8.0], [-4.0, 3.0], [0.0, 0.0]])
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(cosine(query, gallery), expected)


def test_unit_rows_has_no_gradient_at_zero_and_torchs_elsewhere():
    x = torch.randn(4, 3, generator=generator(0, "x"), dtype=torch.float64)
    x[1] = 0
    y = x[[0, 2, 3]].clone().requires_grad_()
    x.requires_grad_()
    weight = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
    (unit_rows(x) * weight).sum().backward()
    (torch.nn.functional.normalize(y) * weight[[0, 2, 3]]).sum().backward()
    assert x.grad[1].tolist() == [0, 0, 0]
    torch.testing.assert_close(x.grad[[0, 2, 3]], y.grad)


def test_an_unknown_learner_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'dscmr'"):
        learner_class("dscrm")
    with pytest.raises(InputError, match=r"no_such_module:X.*No module"):
        learner_class("no_such_module:X")


def test_an_outside_learner_is_named_by_module_and_class():
    assert learner_class("fedxmr.learners.dscmr:DSCMR") is learner_class("dscmr")


def test_the_registry_imports_no_learner():
    code = (
        "import sys, fedxmr.learners as l; "
        "assert not {p.split(':')[0] for p in l.LEARNERS.values()} & set(sys.modules); print(len(l.LEARNERS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == len(LEARNERS)


@pytest.mark.parametrize("bad", [{"name": "adamw"}, {"lr": 0}, {"weight_decay": -1}, {"momentum": 0.9}])
def test_a_bad_optimizer_is_refused(bad):
    with pytest.raises(ValidationError):
        OptimizerConfig(**bad)


def test_layers_multiply_in_what_is_asked_for_and_nothing_else_does():
    network = Network(layers({"a": (30, 20)}, generator(0, "x"), CPU), OptimizerConfig(), True)
    x = torch.randn(5, 30)
    exact = network.linear("a", x)
    with products_in(torch.bfloat16):
        half = network.linear("a", x)
        half.square().sum().backward()
        assert (x @ x.T).dtype == torch.float32
    weight, bias = (network.parameters[f"a.{part}"] for part in ("weight", "bias"))
    rounded = x.bfloat16().double() @ weight.bfloat16().double().T + bias.bfloat16().double()
    assert torch.allclose(half.double(), rounded, rtol=2**-7, atol=2**-7)
    assert half.dtype == weight.grad.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    assert not torch.equal(half, exact)
    assert torch.equal(network.linear("a", x), exact)
