"""What training takes: batches, named parameters with their optimiser, and the loss of a stage.

A learner's `fit` reads

    with network.training(proximal) as step:
        for index in batches(len(data), 20, rng, data.labels.device):
            loss = ...
            step(loss)
            losses.add(loss, len(index))
    return losses.fit()

The optimisers are torch's functional ones: the arithmetic of `torch.optim.Adam(fused=True)`, bit by bit, with moments
that are plain named tensors from the start, and without the import of torch._dynamo (2 s) behind torch.optim's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fedxmr.types import Fit, Proximal, State

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(BaseModel):
    """Adam (Kingma and Ba, ICLR 2015) or plain SGD."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["adam", "sgd"] = Field("adam", description="adam, or sgd without momentum")
    lr: float = Field(1e-3, gt=0, description="learning rate")
    betas: tuple[Decay, Decay] = Field((0.5, 0.999), description="Adam's decay rates of the two moments")
    weight_decay: float = Field(0.0, ge=0, description="added to the gradient, times the weight")


class StandardAdamConfig(OptimizerConfig):
    """Adam with torch's betas, which are its authors', and a learning rate of 1e-4."""

    # fields of a class of its own: a default instance would lose them as soon as a user sets one of its numbers
    lr: float = Field(1e-4, gt=0, description="learning rate")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Adam's decay rates of the two moments")


def batches(n: int, batch_size: int, rng: Generator, device: torch.device, *, shuffle: bool = True) -> Iterator[Tensor]:
    """One epoch: [<= batch_size] int64 indices of n items. The last batch may be small; none is dropped."""
    order = torch.randperm(n, generator=rng) if shuffle else torch.arange(n)
    return iter(torch.split(order.to(device), batch_size)) if n else iter(())


def linear(inputs: int, outputs: int, rng: Generator | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """A layer's weight [outputs, inputs] and bias [outputs], from the distribution torch.nn.Linear draws them from.

    Drawn on the CPU, so a device does not change them. Without rng they are left uninitialised, to be loaded.
    """
    weight, bias = torch.empty(outputs, inputs), torch.empty(outputs)
    if rng is not None:
        bound = inputs**-0.5
        weight.uniform_(-bound, bound, generator=rng)
        bias.uniform_(-bound, bound, generator=rng)
    return weight.to(device), bias.to(device)


def layers(sizes: Mapping[str, tuple[int, int]], rng: Generator | None, device: torch.device) -> dict[str, Tensor]:
    """`<name>.weight` and `<name>.bias` of every layer, name -> (inputs, outputs), drawn by `linear` in their order."""
    parameters = {}
    for name, (inputs, outputs) in sizes.items():
        parameters[f"{name}.weight"], parameters[f"{name}.bias"] = linear(inputs, outputs, rng, device)
    return parameters


def snapshot(live: Mapping[str, Tensor]) -> State:
    """A copy of a learner's tensors as a state."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}


def restore(live: Mapping[str, Tensor], state: State) -> None:
    """Copy a state, or part of one, into a learner's tensors, which stay the same objects.

    Raises ValueError for an unknown name, a wrong shape or a wrong dtype, and then has copied nothing.
    """
    for name, value in state.items():
        if name not in live:
            raise ValueError(f"state: {name!r} is no tensor of this learner (it has {', '.join(sorted(live))})")
        if value.shape != live[name].shape or value.dtype != live[name].dtype:
            expected = f"{list(live[name].shape)} {live[name].dtype}"
            raise ValueError(f"state: {name}: expected {expected}, got {list(value.shape)} {value.dtype}")
    with torch.no_grad():
        for name, value in state.items():
            live[name].copy_(value)


_products: ContextVar[torch.dtype | None] = ContextVar("products", default=None)


@contextmanager
def products_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Within it layers multiply in another type, on the way there and back; None: in float32, as everything else.

    Not torch's autocast, under which losses would be of that type too, and which of them depends on the device.
    """
    before = _products.set(dtype)
    try:
        yield
    finally:
        _products.reset(before)


class Network:
    """Named parameters and the optimiser that trains them.

    parameters: dotted names -> leaf tensors, which stay the same objects for life.
    keep_optimizer: True makes the moments part of the state; False starts every stage with fresh ones.
    """

    def __init__(self, parameters: Mapping[str, Tensor], optimizer: OptimizerConfig, keep_optimizer: bool) -> None:
        self.parameters = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
        self._optimizer = optimizer
        self._kept = self._fresh_moments() if keep_optimizer else None

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x [n, inputs] through the layer `name`: [n, outputs] float32, also where `products_in` says otherwise."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"]
        if (dtype := _products.get()) is None:
            return F.linear(x, weight, bias)
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)).float()

    def live(self) -> dict[str, Tensor]:
        """The tensors themselves, for `snapshot` and `restore`: `<name>` and `optimizer.<moment>.<name>`."""
        moments = self._kept or {}
        named = {f"optimizer.{moment}.{name}": t for moment, of in moments.items() for name, t in of.items()}
        return self.parameters | named

    @contextmanager
    def training(self, proximal: Proximal | None = None) -> Iterator[Callable[[Tensor], None]]:
        """A stage of training; yields the function that takes one step down a loss.

        With `proximal`, mu (w - anchor) joins each gradient: the loss given to the step, and reported, is without the
        proximal term. A parameter a batch's loss does not depend on rests in that step, term or no term.
        No gradient outlives the stage.
        """
        moments = self._kept
        anchor = self._on_device(proximal.anchor) if proximal else {}

        def step(loss: Tensor) -> None:
            nonlocal moments
            if moments is None:  # not before there is a step: a stage of no epochs is to cost nothing
                moments = self._fresh_moments()
            self._drop_gradients()
            loss.backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                if proximal:
                    self._pull(proximal.mu, anchor)
                self._update(moments)

        try:
            yield step
        finally:
            self._drop_gradients()

    def _pull(self, mu: float, anchor: State) -> None:
        for name, target in anchor.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                parameter.grad.add_(parameter - target, alpha=mu)

    def _update(self, moments: dict[str, dict[str, Tensor]]) -> None:
        moving = {name: p for name, p in self.parameters.items() if p.grad is not None}
        parameters = list(moving.values())
        gradients = [p.grad for p in parameters if p.grad is not None]
        config = self._optimizer
        if config.name == "adam":
            adam(
                parameters,
                gradients,
                [moments["exp_avg"][name] for name in moving],
                [moments["exp_avg_sq"][name] for name in moving],
                [],
                [moments["step"][name] for name in moving],
                fused=True,  # 4x faster than the default on a CPU
                amsgrad=False,
                beta1=config.betas[0],
                beta2=config.betas[1],
                lr=config.lr,
                weight_decay=config.weight_decay,
                eps=1e-8,
                maximize=False,
            )
        else:
            sgd(
                parameters,
                gradients,
                [None] * len(parameters),
                fused=True,
                weight_decay=config.weight_decay,
                momentum=0.0,
                lr=config.lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def _fresh_moments(self) -> dict[str, dict[str, Tensor]]:
        if self._optimizer.name == "sgd":
            return {}
        named = {name: p.detach() for name, p in self.parameters.items()}
        return {
            "exp_avg": {name: torch.zeros_like(p) for name, p in named.items()},
            "exp_avg_sq": {name: torch.zeros_like(p) for name, p in named.items()},
            "step": {name: torch.zeros((), device=p.device) for name, p in named.items()},
        }

    def _on_device(self, anchor: State) -> State:
        for name, value in anchor.items():
            if name not in self.parameters or value.shape != self.parameters[name].shape:
                raise ValueError(f"anchor: {name} {list(value.shape)} is no parameter of this learner")
        return {name: value.to(self.parameters[name].device) for name, value in anchor.items()}

    def _drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


class Losses:
    """A stage's batch losses, summed on the device in float64 and read once: `.item()` at each step waits for a GPU.

    A loss that is not finite makes both sums so. It is reported as it is: the server refuses it by name.
    """

    def __init__(self, device: torch.device) -> None:
        self._per_item = torch.zeros((), dtype=torch.float64, device=device)
        self._per_batch = torch.zeros((), dtype=torch.float64, device=device)
        self._items = 0

    def add(self, loss: Tensor, items: int) -> None:
        """One batch: its mean loss, and how many items that is the mean of."""
        self._per_item.add_(loss.detach(), alpha=items)
        self._per_batch.add_(loss.detach())
        self._items += items

    def fit(self) -> Fit:
        """The stage's report; of no batches, that nothing was trained."""
        if not self._items:
            return Fit(loss=0.0, loss_sum=0.0, trained=False)
        per_item, per_batch = torch.stack([self._per_item, self._per_batch]).tolist()
        return Fit(loss=per_item / self._items, loss_sum=per_batch)
