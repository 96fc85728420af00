"""DRSL: deep relational similarity learning (Wang, Hu, Zhen and Peng, Information Sciences 2021).

There is no common subspace. Each modality has a private network f_m; a relation network k looks at a pair of items of
two modalities and says how similar they are, and that number itself ranks the gallery.

    z^m = f_m(x^m): linear layers, each with ReLU                                                        eq. 2, 3
    v_pq = [z_p; z_q], z_p * z_q, z_p + z_q or z_p - z_q                                                 eq. 4
    R_pq = k(v_pq) = w . relu(W v_pq + b) + c                                                            eq. 5
    S_pq = 1 where items p and q share a class, else 0                                                   eq. 9
    L = ||R - S||_F^2                                                                                    eq. 10

The authors' code is not available. Decided where the paper is silent, or other than it says:
- L is the mean over the batch's pairs, not their sum: to Adam a factor is nothing (but for its epsilon), and FedProx's
  mu and FedCMR's f must not depend on the batch size. Of several pairs of modalities, L is the mean over these;
- each modality's batches are drawn by themselves, as the batches b of algorithm 1 allow: DRSL "has no modality-pairwise
  limitation". An epoch uses every row of the modality that has most of them once; the others begin anew meanwhile;
- with more than two modalities, one relation network per unordered pair, its first argument the one whose name sorts
  first: in the paper the image, and "subtract" and "concatenate" are not symmetric. Items may lack modalities. A client
  with one modality has no pair and so no loss: it does not train;
- items with several classes are similar if they share one, or by Jaccard's index (`similar`); eq. 9 read literally
  would want equal label sets. Items without a class are similar to nothing;
- k's hidden layer has ReLU, its last none ("followed by a linear layer"), or a sigmoid (`output`). Its 600 inputs "for
  all datasets" are those of concatenation; for the other fusions they are as many as z has;
- no convolutional networks below (features come from outside) and no batch normalisation (XMediaNet alone had it);
- Adam's betas and the batch size are not given: torch's .9 and .999, and 100.

FedCMR shares the relation networks. They read z in each modality's own basis, so they mean the same to several clients
only because all start from one initial state.

For 4000 x 4000 pairs the hidden layer of k has 16 billion units. But W [z_p; z_q] = W_1 z_p + W_2 z_q, and likewise for
sums and differences: `_PairReLU` adds the two for one tile of pairs at a time and keeps no tile, forward or backward.
"multiply" has no such form: a matrix product for every pair, in tiles too where no gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice, pairwise
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor
from torch.autograd.function import FunctionCtx

from fedxmr.learners.neural import NeuralLearner
from fedxmr.learners.training import Losses, Network, StandardAdamConfig, batches, layers
from fedxmr.types import DataSpec, Fit, Items, Proximal

Fusion = Literal["concatenate", "multiply", "add", "subtract"]
Similar = Literal["binary", "jaccard"]
Width = Annotated[int, Field(ge=1, le=1 << 20)]

_CPU_TILE, _GPU_TILE = 1 << 18, 1 << 26
"""Hidden units in a tile of pairs: 1 MB of float32 stays in a core's cache; a GPU wants few large kernels (256 MB)."""


class DRSLConfig(BaseModel):
    """DRSL's options; the defaults are the paper's networks for Wikipedia and NUS-WIDE-10K."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden: tuple[Width, ...] = Field((1024,), description="widths of each modality's layers before the last; [] none")
    width: Width = Field(300, description="width of z, each modality's last layer")
    relation: Width = Field(1024, description="width of the relation network's hidden layer")
    fusion: Fusion = Field("concatenate", description="what the relation network sees of a pair")
    output: Literal["linear", "sigmoid"] = Field(
        "linear", description="what gives R: linear as in the paper, or sigmoid"
    )
    similar: Similar = Field(
        "binary", description="S of two items: share a class, or shared classes / classes of either"
    )
    pos_weight: float = Field(1.0, gt=0, description="weight of the error at S = 1, relative to that at S = 0")
    relative_loss: bool = Field(
        False, description="report L over that of the best constant R: fewer classes alone make both larger"
    )
    batch_size: int = Field(100, ge=1, le=1 << 31, description="rows of each modality per step")
    optimizer: StandardAdamConfig = Field(StandardAdamConfig(), description="what trains all parameters")
    keep_optimizer: bool = Field(True, description="keep the optimiser's moments from stage to stage")


class Relation(NamedTuple):
    """The parameters of k: W [h, k] (concatenate: [h, 2k]), b [h], w [1, h] and c [1]."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor


def relate(first: Tensor, second: Tensor, network: Relation, fusion: Fusion) -> Tensor:
    """Eq. 4 and 5 of all pairs: z of two modalities, [p, k] and [q, k] -> [p, q], before any sigmoid.

    What is kept at a time is one tile of hidden units, but for "multiply" with a gradient: there all p q h of them.
    """
    weight, bias, output, constant = network
    w = output[0]
    if fusion == "multiply":

        def tile(rows: slice, columns: slice) -> Tensor:
            return F.linear(first[rows, None] * second[columns], weight, bias).relu() @ w

        whole = tile(slice(None), slice(None)) if torch.is_grad_enabled() else _in_tiles(first, second, len(w), tile)
        return whole + constant
    match fusion:
        case "concatenate":
            of_first, of_second = weight[:, : first.shape[1]], weight[:, first.shape[1] :]
        case "add":
            of_first, of_second = weight, weight
        case "subtract":
            of_first, of_second = weight, -weight
    a, b = F.linear(first, of_first, bias), F.linear(second, of_second)
    pairs: Tensor = _PairReLU.apply(a, b, w)  # type: ignore[no-untyped-call]
    return pairs + constant


class _PairReLU(torch.autograd.Function):
    """a [p, h], b [q, h], w [h] -> [p, q]: sum_h w_h relu(a_ph + b_qh).

    Of the gradients only M_pqh = G_pq [a_ph + b_qh > 0] is of three dimensions, and its sums over q and over p suffice:
    relu(a + b) = [a + b > 0] (a + b).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, w)
        return _in_tiles(a, b, len(w), lambda rows, columns: (a[rows, None] + b[columns]).relu_() @ w)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, w = ctx.saved_tensors  # type: ignore[attr-defined]
        of_a, of_b = torch.zeros_like(a), torch.zeros_like(b)
        for rows, columns in _tiles(a, b, len(w)):
            moved = (a[rows, None] + b[columns]).gt_(0).mul_(gradient[rows, columns, None])
            of_a[rows] += moved.sum(1)
            of_b[columns] += moved.sum(0)
        return of_a * w, of_b * w, (a * of_a).sum(0) + (b * of_b).sum(0)


def _in_tiles(a: Tensor, b: Tensor, width: int, score: Callable[[slice, slice], Tensor]) -> Tensor:
    """[len(a), len(b)] filled tile by tile."""
    scores = a.new_empty(len(a), len(b))
    for rows, columns in _tiles(a, b, width):
        scores[rows, columns] = score(rows, columns)
    return scores


def _tiles(a: Tensor, b: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Slices of a and of b whose pairs, times width, are a tile or less, and at least one pair; together all pairs."""
    pairs = max(1, (_CPU_TILE if a.device.type == "cpu" else _GPU_TILE) // width)
    width_b = max(1, min(len(b), pairs))
    width_a = pairs // width_b
    for i in range(0, len(a), width_a):
        for j in range(0, len(b), width_b):
            yield slice(i, i + width_a), slice(j, j + width_b)


def same_class(first: Tensor, second: Tensor, similar: Similar) -> Tensor:
    """S of eq. 9: [p, C] and [q, C] float 0 or 1 -> [p, q]; 0 for an item without a class."""
    shared = first @ second.T
    if similar == "binary":
        return shared.clamp_(max=1)
    either = first.sum(1)[:, None] + second.sum(1) - shared
    return shared / either.clamp_(min=1)


def drsl_loss(related: Tensor, similar: Tensor, pos_weight: float = 1.0) -> Tensor:
    """L of eq. 10 over the number of pairs: R and S [p, q] -> the mean of (1 + (pos_weight - 1) S) (R - S)^2."""
    error = (related - similar).square()
    return error.mean() if pos_weight == 1 else (error * (1 + (pos_weight - 1) * similar)).mean()


def powers(similar: Tensor) -> Tensor:
    """[3] float64, the means of S, S^2 and S^3 over the pairs of a batch."""
    s = similar.double()
    return torch.stack([s.mean(), s.square().mean(), (s * s * s).mean()])


def constant_loss(means: Sequence[float], pos_weight: float = 1.0) -> float:
    """The least L that an R equal for all pairs has, from the means of S, S^2 and S^3; p (1 - p) where S is 0 or 1.

    The minimum over r of the mean of a (r - S)^2 with a = 1 + (pos_weight - 1) S is E[a S^2] - E[a S]^2 / E[a].
    """
    first, second, third = means
    more = pos_weight - 1
    return second + more * third - (first + more * second) ** 2 / (1 + more * first)


class DRSL(NeuralLearner):
    """The learner.

    Its parameters: `towers.<modality>.<layer>` and, for modalities a < b, `relations.<a>.<b>.hidden` and
    `relations.<a>.<b>.output`, each `.weight` and `.bias`.
    """

    Config = DRSLConfig

    def __init__(self, config: DRSLConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._config = config
        self._device = device
        self._pairs = list(combinations(sorted(spec.dims), 2))
        fused = config.width * (2 if config.fusion == "concatenate" else 1)
        sizes = {}
        for m in sorted(spec.dims):
            for layer, size in enumerate(pairwise([spec.dims[m], *config.hidden, config.width])):
                sizes[f"towers.{m}.{layer}"] = size
        for a, b in self._pairs:
            sizes[f"relations.{a}.{b}.hidden"] = (fused, config.relation)
            sizes[f"relations.{a}.{b}.output"] = (config.relation, 1)
        parameters = layers(sizes, rng, device)
        self._network = Network(parameters, config.optimizer, config.keep_optimizer)
        self.trainable = frozenset(parameters)
        self.common = frozenset(name for name in parameters if name.startswith("relations."))

    def owned(self, held: Collection[str]) -> frozenset[str]:
        """The relation networks of the pairs of what is held, and the towers they compare."""
        pairs = list(combinations(sorted(held), 2))
        relations = tuple(f"relations.{a}.{b}." for a, b in pairs)
        towers = tuple(f"towers.{m}." for pair in pairs for m in pair)
        return frozenset(name for name in self.trainable if name.startswith((*relations, *towers)))

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        """Train for some epochs. Reports the mean of L over all pairs of items seen; the proximal term is left out.

        A client with fewer than two modalities does not train.
        """
        config = self._config
        pairs = list(combinations(data.modalities, 2))
        losses = Losses(self._device)
        means, seen = torch.zeros(3, dtype=torch.float64, device=self._device), 0
        if not pairs:
            return losses.fit()
        data = data.to(self._device)
        features = {m: data.features[m].float() for m in data.modalities}
        labels = {m: data.labels[data.rows[m]].float() for m in data.modalities}
        sizes = {m: len(x) for m, x in features.items()}
        with self._network.training(proximal) as step:
            for _ in range(epochs):
                for rows in _batches(sizes, config.batch_size, rng, self._device):
                    y = {m: labels[m][index] for m, index in rows.items()}
                    targets = {(a, b): same_class(y[a], y[b], config.similar) for a, b in pairs}
                    loss = self._loss({m: features[m][index] for m, index in rows.items()}, targets)
                    step(loss)
                    count = sum(s.numel() for s in targets.values())
                    losses.add(loss, count)
                    if config.relative_loss:
                        means += count * torch.stack([powers(s) for s in targets.values()]).mean(0)
                        seen += count
        fit = losses.fit()
        # 1e-12: where S is the same for all pairs, rounding may leave something
        if seen and (least := constant_loss((means / seen).tolist(), config.pos_weight)) > 1e-12:
            fit = replace(fit, loss=fit.loss / least, loss_sum=fit.loss_sum / least)
        return fit

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:
        """R, [q, width] and [g, width] -> [q, g]; ValueError for modalities that are no pair.

        Both directions read one matrix: the second is the first transposed.
        """
        first, second = sorted(direction)
        if (first, second) not in self._pairs:
            known = ", ".join(f"{a} and {b}" for a, b in self._pairs)
            raise ValueError(f"similarity: expected two modalities ({known}), got {direction[0]} and {direction[1]}")
        with torch.no_grad():
            if direction == (first, second):
                return self._relate(query, gallery, direction)
            return self._relate(gallery, query, (first, second)).T.contiguous()

    def _loss(self, x: Mapping[str, Tensor], targets: Mapping[tuple[str, str], Tensor]) -> Tensor:
        """L of a batch: features by modality, S by pair of modalities; the mean over the pairs of modalities."""
        z = {m: self._embed(m, of) for m, of in x.items()}
        weight = self._config.pos_weight
        return torch.stack(
            [drsl_loss(self._relate(z[a], z[b], (a, b)), s, weight) for (a, b), s in targets.items()]
        ).mean()

    def _embed(self, modality: str, x: Tensor) -> Tensor:
        """z, in the modality's own space."""
        for layer in range(len(self._config.hidden) + 1):
            x = self._network.linear(f"towers.{modality}.{layer}", x).relu()
        return x

    def _relate(self, first: Tensor, second: Tensor, pair: tuple[str, str]) -> Tensor:
        layer = f"relations.{pair[0]}.{pair[1]}"
        names = (f"{layer}.{part}" for part in ("hidden.weight", "hidden.bias", "output.weight", "output.bias"))
        network = Relation(*(self._network.parameters[name] for name in names))
        related = relate(first, second, network, self._config.fusion)
        return related.sigmoid() if self._config.output == "sigmoid" else related


def _batches(
    sizes: Mapping[str, int], batch_size: int, rng: Generator, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """One epoch: for every step, modality -> the feature rows drawn of it; as many steps as the largest needs."""

    def endless(n: int) -> Iterator[Tensor]:
        while True:
            yield from batches(n, batch_size, rng, device)

    steps = -(-max(sizes.values()) // batch_size)
    for drawn in islice(zip(*(endless(n) for n in sizes.values()), strict=True), steps):
        yield dict(zip(sizes, drawn, strict=True))
