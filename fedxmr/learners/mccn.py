"""MCCN: multimodal coordinated clustering network (Zeng, Sun and Mao, ACM MM 2021; no code was published).

Each modality has a private tower, a linear layer with ReLU; one linear layer with ReLU shared by all of them spans the
common subspace, where every class has a prototype. Retrieval ranks by the cosine there; prototypes serve training only.

Coordination (eq. 3-9): a modality with fewer embeddings than the richest one is padded class by class, and each padding
embedding is replaced by a real one of the class, from another modality, drawn anew every epoch; see `coordination.py`,
also for what the paper leaves open there.
Clustering (eq. 10-11), with d to the own prototype, d^ to the wrong ones, both Euclidean:

    L = sum over modalities of log[1 + sum_a exp(s ((d_a - Dp) - (d^_b - Dn))) over all a, b]

Only Delta = Dn - Dp matters there: with Dp = m and Dn = 1 - m it is 1 - 2m, the margin of eq. 10.

Where the paper is silent or contradicts itself:
- `pairing: per_sample` takes each sample's own a and b and the mean over samples. As printed, one sum runs over a whole
  batch, and its gradient is that of the hardest pair: with classes that overlap it hardly trains at s = 64.
- Embeddings and prototypes are scaled to length 1 (`normalise`): margins of m and 1 - m need distances of that order.
- An item with several classes: per sample, d is the mean distance to its prototypes; literally, each is an own one. An
  item with no class has no prototype, and rests.
- A prototype is zero until the first stage that has items of its class sets it to their mean embedding, over all
  modalities; from then on it is trained like a weight. While zero it is nobody's wrong prototype. So "not yet started"
  is part of the state, a row nobody owns stays zero in the federation, and a client that joins late goes on from the
  prototypes it receives. With a proximal term a row starts at the minimum of |o - mean|^2 / 2 + mu |o - anchor|^2 / 2.
  Departs from starting the rows of classes that nobody has met at random unit vectors, which would repel from the
  start: under label skew zero rows did better. So a client with one class alone has nothing wrong in its first round
  and loss 0, for which FedCMR's weights, eq. 4 and 5, favour it in that round.
- The paper's "mean of embeddings" is taken once; prototypes that are computed anew every epoch, or as a moving average,
  are not offered.
- Reported is the mean per-sample loss, also where the loss is eq. 11's: that one grows with the batch and the classes.
- Without clustering (`loss: pairwise`, Table 5's "w/o MCC") the loss is l2 of DSCMR, the "pair-wise constraints" of
  [47], and there are no prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from fedxmr.learners.coordination import Batch, Route, Samples
from fedxmr.learners.cosine import unit_rows
from fedxmr.learners.neural import NeuralLearner
from fedxmr.learners.pairwise import pairwise_loss
from fedxmr.learners.training import Losses, Network, StandardAdamConfig, layers
from fedxmr.types import DataSpec, Fit, Items, Proximal


class MCCNConfig(BaseModel):
    """MCCN's options. Defaults are the paper's where it states them and they train.

    Tables 5 and 6: "w/o Delta_p" is `intra_margin: false`, "w/o Delta_n" `inter_margin: false`, "w/o MCC"
    `loss: pairwise`, "w/o MCE" `coordinate: false`. As printed: `pairing: literal`, `route: padded`, `eps: 1000`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden: int = Field(2048, ge=1, le=1 << 20, description="width of each modality's private layer")
    width: int = Field(1024, ge=1, le=1 << 20, description="width of the common subspace")
    loss: Literal["clustering", "pairwise"] = Field("clustering", description="eq. 11, or DSCMR's pair-wise term")
    pairing: Literal["per_sample", "literal"] = Field(
        "per_sample", description="distances compared within a sample, or all of a batch with all (eq. 11 as printed)"
    )
    scale: float = Field(4.0, gt=0, le=1e6, description="s, the paper's lambda; its grid is 32 to 1024 (literal)")
    m: float = Field(0.2, ge=0, le=1, description="Delta_p = m and Delta_n = 1 - m; the paper's grid is 0 to 0.5")
    intra_margin: bool = Field(True, description="false leaves Delta_p out: the margin of eq. 10 is then 1 - m")
    inter_margin: bool = Field(True, description="false leaves Delta_n out: the margin of eq. 10 is then -m")
    normalise: bool = Field(True, description="distances between rows scaled to length 1")
    coordinate: bool = Field(True, description="pad the modalities and replace the padding; false: as they are")
    route: Route = Field(
        "source",
        description="a replacement goes through its own tower, or, filled up with zeros, the padded modality's",
    )
    eps: float | None = Field(None, gt=1, description="eq. 6's ratio; the paper has 1000; null: along edges only")
    batch_size: int = Field(128, ge=1, le=1 << 31, description="embeddings of the richest modality per step")
    optimizer: StandardAdamConfig = Field(StandardAdamConfig(), description="what trains all parameters")
    keep_optimizer: bool = Field(True, description="keep the optimiser's moments from stage to stage")

    @property
    def margin(self) -> float:
        """Delta of eq. 10, Delta_n - Delta_p: 1 - 2m, or what an ablation leaves of it."""
        return (1 - self.m if self.inter_margin else 0.0) - (self.m if self.intra_margin else 0.0)


def distances(embeddings: Tensor, prototypes: Tensor, *, normalise: bool = True) -> Tensor:
    """[N, k] and [C, k] -> [N, C] Euclidean distances, of rows scaled to length 1 or as they are.

    A zero row has no direction and stays zero. sqrt(x + 1e-12): where the two meet, the gradient is finite.
    """
    if normalise:
        embeddings, prototypes = unit_rows(embeddings), unit_rows(prototypes)
    squares = embeddings.square().sum(1, keepdim=True) + prototypes.square().sum(1) - 2 * embeddings @ prototypes.T
    return (squares.clamp(min=0) + 1e-12).sqrt()


def per_sample_loss(distance: Tensor, own: Tensor, wrong: Tensor, scale: float, margin: float) -> Tensor:
    """Eq. 10 for each sample by itself: log[1 + sum over wrong b of exp(scale (d - d^_b + margin))] -> [N].

    distance [N, C]. own, wrong [N, C] bool: the sample's classes, and those it is kept from. d is the mean distance to
    the own prototypes. Without a wrong one the loss is 0. No scale makes it overflow.
    """
    positive = (distance * own).sum(1) / own.sum(1).clamp(min=1)
    return _softplus(scale * (positive + margin) + _masked_logsumexp(-scale * distance, wrong))


def all_pairs_loss(distance: Tensor, own: Tensor, wrong: Tensor, scale: float, margin: float) -> Tensor:
    """Eq. 10, which is eq. 11 with margin = Delta_n - Delta_p, for one modality's samples -> scalar.

    As per_sample_loss, but every own distance of the batch is compared with every wrong one. Of no samples, 0.
    """
    positive = _masked_logsumexp((scale * distance).flatten(), own.flatten())
    negative = _masked_logsumexp((-scale * distance).flatten(), wrong.flatten())
    return _softplus(positive + scale * margin + negative)


def _masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """logsumexp over the last dimension where mask holds; of nothing, a large negative number with no gradient.

    Not -inf: logsumexp's gradient there is NaN.
    """
    return x.masked_fill(~mask, torch.finfo(x.dtype).min / 8).logsumexp(-1)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own threshold of 20 shows in float64."""
    return F.softplus(x, threshold=50)


class MCCN(NeuralLearner):
    """The learner. Its parameters: `towers.<modality>` and `common`, each `.weight` and `.bias`, and `prototypes`."""

    Config = MCCNConfig

    def __init__(self, config: MCCNConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._config = config
        self._device = device
        widest = max(spec.dims.values())
        self._inputs = {m: widest if config.route == "padded" else d for m, d in spec.dims.items()}
        sizes = {f"towers.{m}": (self._inputs[m], config.hidden) for m in sorted(spec.dims)}
        sizes["common"] = (config.hidden, config.width)
        parameters = layers(sizes, rng, device)
        prototypes = frozenset({"prototypes"} if config.loss == "clustering" else ())
        for name in prototypes:
            parameters[name] = torch.zeros(spec.num_classes, config.width, device=device)
        self._network = Network(parameters, config.optimizer, config.keep_optimizer)
        self.common = frozenset({"common.weight", "common.bias"}) | prototypes
        self.trainable = frozenset(parameters)
        self.by_class = prototypes

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        """Start the prototypes that have not been, then train for some epochs. Reports the mean loss per embedding.

        So clients with few modalities and with many are comparable; with the same number of embeddings in each of M
        modalities, and paired per sample, it is L / M. Of `loss: pairwise` it is the mean over pairs of modalities.
        """
        data = data.to(self._device)
        labelled = data.labels.any(1)
        if not bool(labelled.all()):
            data = data.select(labelled.nonzero().flatten())
        losses = Losses(self._device)
        if not data.modalities:
            return losses.fit()
        started = self._start(data, proximal)
        if not epochs:
            return losses.fit()
        config = self._config
        samples = Samples(data, config.batch_size, coordinate=config.coordinate, route=config.route, eps=config.eps)
        with self._network.training(proximal) as step:
            for _ in range(epochs):
                for batch in samples.epoch(rng):
                    loss, reported = self._loss(self._embed_batch(data, batch), batch, started)
                    step(loss)
                    losses.add(reported, len(batch.weight))
        return losses.fit()

    def _start(self, data: Items, proximal: Proximal | None) -> Tensor:
        """Set the prototypes that are zero to their class means in `data` -> [C] bool, those that there are now."""
        if not self.by_class:
            return data.labels.any(0)
        prototypes = self._network.parameters["prototypes"]
        with torch.no_grad():
            classes = {m: data.labels[data.rows[m]].float() for m in data.modalities}
            count = torch.stack([y.sum(0) for y in classes.values()]).sum(0)[:, None]
            fresh = ~prototypes.any(1, keepdim=True) & (count > 0)
            if bool(fresh.any()):
                start = torch.zeros_like(prototypes)
                for m, y in classes.items():
                    embedded = self.encode(m, data.features[m])
                    start += y.T @ (unit_rows(embedded) if self._config.normalise else embedded)
                start /= count.clamp(min=1)
                if proximal and "prototypes" in proximal.anchor:
                    anchor = proximal.anchor["prototypes"].to(self._device)
                    start = (start + proximal.mu * anchor) / (1 + proximal.mu)
                prototypes.copy_(torch.where(fresh, start, prototypes))
            return prototypes.any(1)

    def _loss(self, embeddings: Tensor, batch: Batch, started: Tensor) -> tuple[Tensor, Tensor]:
        """What a step goes down, and what it reports."""
        config = self._config
        if config.loss == "pairwise":
            loss = pairwise_loss(embeddings, batch.classes, batch.modality, batch.weight)
            modalities = batch.weight.sum()  # of those with an embedding in this batch, each adds one
            return loss, loss.detach() / (modalities * (modalities + 1) / 2)
        distance = distances(embeddings, self._network.parameters["prototypes"], normalise=config.normalise)
        wrong = started & ~batch.classes
        if config.pairing == "per_sample":
            each = per_sample_loss(distance, batch.classes, wrong, config.scale, config.margin)
            return (each * batch.weight).sum(), each.detach().mean()
        loss = embeddings.new_zeros(())
        for modality in range(len(self._inputs)):
            counted = (batch.modality == modality)[:, None]
            loss = loss + all_pairs_loss(
                distance, batch.classes & counted, wrong & counted, config.scale, config.margin
            )
        each = per_sample_loss(distance.detach(), batch.classes, wrong, config.scale, config.margin)
        return loss, each.mean()

    def _embed_batch(self, data: Items, batch: Batch) -> Tensor:
        hidden = [self._tower(tower, data.features[source][rows]) for tower, source, rows in batch.parts]
        return self._network.linear("common", torch.cat(hidden)).relu()

    def _embed(self, modality: str, x: Tensor) -> Tensor:
        return self._network.linear("common", self._tower(modality, x)).relu()

    def _tower(self, modality: str, x: Tensor) -> Tensor:
        """Private layer; features narrower than it (`route: padded`) are filled up with zeros (eq. 3)."""
        missing = self._inputs[modality] - x.shape[1]
        x = F.pad(x.float(), (0, missing)) if missing else x.float()
        return self._network.linear(f"towers.{modality}", x).relu()
