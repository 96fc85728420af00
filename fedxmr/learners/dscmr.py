"""DSCMR: deep supervised cross-modal retrieval (Zhen, Hu, Wang and Peng, CVPR 2019).

Each modality has a private tower, a linear layer with ReLU; one linear layer shared by all of them spans the common
subspace, and a linear classifier on it is shared too. Retrieval ranks by the cosine there.

    J = l1 + lambda l2 + eta l3
    l1 = sum over modalities m of mean_i ||P(u_i^m) - y_i||
    l2 = sum over modality pairs {m, m'}, m = m' too, of mean_ij [log(1 + e^G_ij) - S_ij G_ij],
         G_ij = cos(u_i^m, u_j^m') / 2 and S_ij = [items i and j share a class]
    l3 = sum over modality pairs m < m' of mean_i ||u_i^m - u_i^m'||

The norms are not squared. This is what the authors' code (penghu-cs/DSCMR) computes; it departs from it so:
- any number of modalities, and items may lack some: each mean runs over the items that have what it needs;
- items with several classes count as similar once, not once per class they share (`similar`);
- sqrt(x + 1e-12) for a norm and cosine 0 for a zero row, where the code has infinite gradients;
- seeded shuffling (`shuffle`), leaky ReLU on the subspace as in FedCMR's code (`activation`), lambda 0.1 (`lambda`).
The papers' printed form has Frobenius norms (`norm`), and FedCMR's eq. 1 counts a pair of modalities twice (`blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from fedxmr.learners.neural import NeuralLearner
from fedxmr.learners.pairwise import Blocks, Similar, pairwise_loss
from fedxmr.learners.training import Losses, Network, OptimizerConfig, batches, layers
from fedxmr.types import DataSpec, Fit, Items, Proximal

Norm = Literal["row", "frobenius"]


class DSCMRConfig(BaseModel):
    """DSCMR's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    hidden: int = Field(512, ge=1, le=1 << 20, description="width of each modality's private layer")
    width: int = Field(256, ge=1, le=1 << 20, description="width of the common subspace")
    activation: Literal["leaky_relu", "relu", "none"] = Field(
        "leaky_relu", description="on the common subspace: leaky_relu (slope 0.01) in FedCMR's code, none in DSCMR's"
    )
    lambda_: float = Field(0.1, alias="lambda", ge=0, description="weight of l2, similarity by shared classes")
    eta: float = Field(0.1, ge=0, description="weight of l3, the distance between an item's modalities")
    norm: Norm = Field("row", description="l1, l3: mean of the rows' norms (code) or Frobenius norm / n (papers)")
    blocks: Blocks = Field("unordered", description="l2: a pair of modalities counts once (code) or twice (FedCMR)")
    similar: Similar = Field("binary", description="S of two items: share a class, or the count of classes they share")
    batch_size: int = Field(50, ge=1, le=1 << 31, description="items per step")
    shuffle: bool = Field(True, description="draw the batches anew every epoch")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="what trains all parameters")
    keep_optimizer: bool = Field(True, description="keep the optimiser's moments from stage to stage")


class Terms(NamedTuple):
    """The three terms of the loss, unweighted scalars."""

    label: Tensor
    similarity: Tensor
    invariance: Tensor


def dscmr_loss(
    common: Tensor,
    predicted: Tensor,
    rows: Sequence[Tensor],
    labels: Tensor,
    *,
    norm: Norm = "row",
    blocks: Blocks = "unordered",
    similar: Similar = "binary",
) -> Terms:
    """l1, l2 and l3 of one batch of n items.

    common [N, k], predicted [N, C]: representations and classifier outputs, one modality's rows after the other's.
    rows: per modality [n_m] int64, increasing: the item each row belongs to; the n_m add up to N.
    labels [n, C] bool. A modality without rows, and a pair of modalities without a common item, contribute nothing.
    """
    sizes = [len(r) for r in rows]
    target = labels[torch.cat(list(rows))].to(common.dtype)

    label = _sum([_mean_norm(error, norm) for error in torch.split(predicted - target, sizes)], common)

    # filled where they are to be: a tensor made of numbers would have the host wait for a GPU at each step
    modality = torch.cat([torch.full((n,), i, device=common.device) for i, n in enumerate(sizes)])
    weight = torch.cat([common.new_full((n,), 1 / max(n, 1)) for n in sizes])
    similarity = pairwise_loss(common, target, modality, weight, blocks=blocks, similar=similar)

    parts = list(zip(torch.split(common, sizes), rows, strict=True))
    distances = []
    for (u, of_u), (v, of_v) in combinations(parts, 2):
        if len(of_u) == len(of_v) == len(labels):  # every item has both
            difference = u - v
        else:
            difference = u[torch.isin(of_u, of_v)] - v[torch.isin(of_v, of_u)]
        distances.append(_mean_norm(difference, norm))
    return Terms(label, similarity, _sum(distances, common))


def _mean_norm(x: Tensor, norm: Norm) -> Tensor:
    """[n, k] -> the mean of the rows' norms, or the Frobenius norm / n; 0 for no rows. The gradient at x = 0 is 0."""
    if not len(x):
        return x.new_zeros(())
    squares = x.square().sum(dim=1)
    if norm == "row":
        return (squares + 1e-12).sqrt().mean()
    return (squares.sum() + 1e-12).sqrt() / len(x)


def _sum(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(terms)).sum() if terms else like.new_zeros(())


class DSCMR(NeuralLearner):
    """The learner. Its parameters: `towers.<modality>`, `common` and `classifier`, each `.weight` and `.bias`."""

    Config = DSCMRConfig

    common = frozenset({"common.weight", "common.bias"})
    # The classifier's rows belong to classes, but its outputs are regressed on 0 as well as 1: a client without a class
    # trains that row too (towards 0), and the papers average it like any other.
    by_class: frozenset[str] = frozenset()

    def __init__(self, config: DSCMRConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._config = config
        self._modalities = sorted(spec.dims)
        self._device = device
        sizes = {f"towers.{m}": (spec.dims[m], config.hidden) for m in self._modalities}
        sizes |= {"common": (config.hidden, config.width), "classifier": (config.width, spec.num_classes)}
        parameters = layers(sizes, rng, device)
        self._network = Network(parameters, config.optimizer, config.keep_optimizer)
        self.trainable = frozenset(parameters)

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        """Train for some epochs. Reports J, with l1 as if the modalities the client lacks cost what its own do.

        So a client with one modality of two and one with both are comparable, and the latter reports J itself. The
        proximal term is left out. With `similar: count` l2 can be negative: what is reported stops at 0.
        """
        config = self._config
        losses = Losses(self._device)
        data = data.to(self._device)
        missing = len(self._modalities) / len(data.modalities) - 1 if data.modalities else 0.0
        with self._network.training(proximal) as step:
            for _ in range(epochs):
                for index in batches(len(data), config.batch_size, rng, self._device, shuffle=config.shuffle):
                    batch = data.select(index)
                    if not batch.modalities:  # nobody has seen these items
                        continue
                    terms = self._terms(batch)
                    loss = terms.label + config.lambda_ * terms.similarity + config.eta * terms.invariance
                    step(loss)
                    losses.add(loss.detach() + missing * terms.label.detach() if missing else loss, len(batch))
        fit = losses.fit()
        # max(nan, 0.0) is nan: a loss that is not finite must reach the server
        return replace(fit, loss=max(fit.loss, 0.0), loss_sum=max(fit.loss_sum, 0.0))

    def _embed(self, modality: str, x: Tensor) -> Tensor:
        return self._subspace(self._tower(modality, x))

    def _terms(self, batch: Items) -> Terms:
        seen = batch.modalities
        common = self._subspace(torch.cat([self._tower(m, batch.features[m].float()) for m in seen]))
        config = self._config
        return dscmr_loss(
            common,
            self._network.linear("classifier", common),
            [batch.rows[m] for m in seen],
            batch.labels,
            norm=config.norm,
            blocks=config.blocks,
            similar=config.similar,
        )

    def _tower(self, modality: str, x: Tensor) -> Tensor:
        return self._network.linear(f"towers.{modality}", x).relu()

    def _subspace(self, hidden: Tensor) -> Tensor:
        x = self._network.linear("common", hidden)
        match self._config.activation:
            case "leaky_relu":
                return F.leaky_relu(x, 0.01)
            case "relu":
                return x.relu()
            case "none":
                return x
