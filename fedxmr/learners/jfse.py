"""JFSE: joint feature synthesis and embedding (Xu, Lin, Yang, Hanjalic and Shen, TPAMI 44(6), 2022).

Class vectors c, fixed and known to everybody, are the common subspace. Of each modality m a regressor R_m embeds
features there, a generator G_m makes features x~ = G_m(c, z) out of a class vector and noise, and a critic D_m tells
these from true ones; one modality discriminator D_M, behind a gradient reversal, tells embeddings of one modality from
another's. Retrieval ranks by the cosine. Per batch, `critic_steps` steps of the critics, then one of all the others:

    critics  max  E D(x, c) - E D(x~, c) - a E(||grad D(x^, c)|| - 1)^2,  x^ between x and x~           (eq. 1-3)
    joint    min  L_true + L_synthetic - E D(x~, c)                                                      (eq. 16)
             L    = beta L_DA + gamma L_ADV + lambda L_CYC                                               (eq. 5-15)
             L_CYC = sum over m of E ||c - e_m||^2 / s,  L_ADV the discriminator's cross entropy

with s the width of c, L_true of e = R_m(x) and L_synthetic of e = R_m(x~). The paper, the authors' code
(CFM-MSG/Code_JFSE) and this module differ in places:
- Eq. 16 lets the discriminator ascend gamma L_ADV, which is consistent only if L_ADV were its success; eq. 14 is its
  cross entropy, its arguments swapped. As in the code, D_M descends the cross entropy and all before it ascend, times
  the usual ramp 2 / (1 + exp(-10 epoch / `ramp`)) - 1.
- The code gives synthetic terms small weights, and other ones in the regressors' loss (`synthetic`) than in the
  generators' (`generator`); the paper has 1 for both. Weights default to the code's. A single backward pass does all
  of it: gradients are rescaled where they pass from D_M to R and from R to G. So generators, regressors and
  discriminator move at once, as in the code; Algorithm 1 moves them one after the other.
- L_CYC is a mean over dimensions, as in the code, whose weights go with it; eq. 15 prints the sum, which lambda = s
  would give, and under which the code's beta and gamma do next to nothing. The code's class vectors are in [0, 1], as
  with `embedding: relu`; of length 1, the default, they make L_CYC smaller, so that beta and gamma count for more.
  FedProx's mu and a weight decay stand against this smaller loss: mu = .2 / s does what .2 did beside the sum, and the
  preset's .2 keeps the networks of length-1 vectors where they start.
- The paper ends regressors and generators in a ReLU, out of whose reach negative coordinates are; the code rescales
  class vectors and features to [0, 1] in every batch, so that targets move. Here both end linearly by default. With
  `embedding: relu` class vectors are scaled to [0, 1] per dimension, once, over all classes, seen and unseen;
  `features: relu` is for features that are >= 0; to scale others to [0, 1], fitted on training items, is not offered,
  for a common scaling would need every client's extremes, which are features of single items.
- Embeddings are ranked as they are. The code also scales them by mean and deviation over the test set, and takes the
  best of four variants there.
- Every critic step has noise of its own; the code repeats one draw. The slope of a critic of two layers has a closed
  form, which is differentiated in place of a second backward pass. Its last layer has no bias: no loss depends on
  one.
- D_M has leaky ReLUs between its layers; the paper names none, and the code's three linear layers are one.
- Any number of modalities: D_M has one output less than modalities, the first one's logit being 0 (for two, the
  paper's sigmoid), and L_DA sums over unordered pairs. Items may lack modalities. L_DA and L_ADV need two of them in
  a batch.
- Items of several classes have the mean of their class vectors; items of no class are left out of training.
- Zero-shot tasks (section 3.4): items of an unseen class are left out of training, and every batch has as many
  synthetic ones of unseen classes, with L alone, for there is nothing true to compare them with (`imagine`).
- A data set without class vectors gets seeded orthonormal ones, which say nothing about what classes mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator
from torch import Generator, Tensor

from fedxmr.errors import InputError
from fedxmr.learners.adversarial import SLOPE, Critic, critic_loss, modality_loss, scale_gradient
from fedxmr.learners.alignment import SCHEMES, Pair, Scheme
from fedxmr.learners.cosine import unit_rows
from fedxmr.learners.neural import NeuralLearner
from fedxmr.learners.training import Losses, Network, OptimizerConfig, batches, layers
from fedxmr.types import DataSpec, Fit, Items, Proximal


class JFSEOptimizer(OptimizerConfig):
    """Adam with the paper's learning rate."""

    lr: float = Field(1e-4, gt=0, description="learning rate")


class JFSEConfig(BaseModel):
    """JFSE's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    hidden: int = Field(
        512, ge=1, le=1 << 20, description="width of all hidden layers but the discriminator's; 4096 in paper and code"
    )
    layers: int = Field(2, ge=1, le=8, description="layers of a regressor: 2 in the code, 3 in the paper")
    embedding: Literal["linear", "relu"] = Field(
        "linear", description="a regressor's end; relu is the paper's, with class vectors scaled to [0, 1]"
    )
    width: int = Field(300, ge=1, le=1 << 20, description="of made-up class vectors, where the data set has none")
    class_seed: int = Field(0, ge=0, lt=1 << 63, description="of made-up class vectors")
    allow_random: bool = Field(
        False, description="made-up class vectors also in zero-shot tasks, of whose classes they say nothing"
    )
    synthesis: bool = Field(True, description="generators and critics; without them true features alone are used")
    features: Literal["linear", "relu"] = Field("linear", description="a generator's end; relu for features >= 0")
    noise: int = Field(300, ge=1, le=1 << 20, description="width of a generator's noise")
    critic_steps: int = Field(5, ge=1, le=1000, description="steps of the critics per batch")
    penalty: float = Field(10.0, ge=0, description="a of eq. 1, weight of the gradient penalty")
    copies: int = Field(1, ge=1, le=1000, description="synthetic items per true one in the joint step; figure 11: 2")
    imagine: Literal["none", "unseen", "missing"] = Field(
        "unseen", description="classes synthesised beyond the batch's: unseen ones, or all the client has no items of"
    )
    alignment: tuple[Scheme, ...] = Field(("cmpm",), description="the schemes that L_DA sums; none of them: []")
    beta: float = Field(1e-4, ge=0, description="weight of L_DA; the paper's grid is .001 to 1000")
    gamma: float = Field(0.01, ge=0, description="weight of L_ADV; the same grid")
    lambda_: float = Field(
        1.0, alias="lambda", ge=0, description="weight of L_CYC; the same grid, for a sum over dimensions"
    )
    synthetic: float = Field(0.01, gt=0, description="weight of synthetic terms for regressors; 1 in the paper")
    generator: float = Field(0.1, ge=0, description="weight of the terms of embeddings for generators; 1 in the paper")
    discriminator: tuple[PositiveInt, PositiveInt] = Field(
        (300, 150), description="widths of the modality discriminator's hidden layers"
    )
    ramp: int = Field(500, ge=0, description="epochs in which the gradient reversal comes to its full size; 0: none")
    batch_size: int = Field(64, ge=1, le=1 << 31, description="items per step")
    shuffle: bool = Field(True, description="draw the batches anew every epoch")
    optimizer: JFSEOptimizer = Field(JFSEOptimizer(), description="what trains all parameters, each with own moments")
    keep_optimizer: bool = Field(True, description="keep the optimiser's moments from stage to stage")

    @field_validator("alignment")
    @classmethod
    def _distinct(cls, schemes: tuple[Scheme, ...]) -> tuple[Scheme, ...]:
        if len(set(schemes)) < len(schemes):
            raise ValueError(f"expected every scheme once, got {', '.join(schemes)}")
        return schemes

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if not (self.lambda_ or self.gamma or (self.beta and self.alignment)):
            raise ValueError("lambda, gamma, beta: expected one above 0, or nothing trains the regressors")
        return self


def cycle_loss(embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Eq. 15 over s for one set of embeddings: the sum over modalities of mean_i ||c_i - e_i||^2 / s.

    Per modality [n_m, s], n_m > 0.
    """
    return torch.stack([F.mse_loss(e, c) for e, c in zip(embeddings, targets, strict=True)]).sum()


def orthonormal(rows: int, width: int, seed: int) -> Tensor:
    """[rows, width] float32: orthonormal rows, rows <= width, uniformly distributed, the same for the same seed."""
    normal = torch.randn(width, rows, generator=Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    rows_of_q: Tensor = (q * r.diagonal().sign()).T  # the signs: LAPACKs differ in them
    return rows_of_q.float().contiguous()


def class_targets(config: JFSEConfig, spec: DataSpec) -> Tensor:
    """[C, s] float32, the class vectors as regressors aim at them.

    Of length 1, or with `embedding: relu` each dimension scaled to [0, 1] over all classes, seen and unseen.
    Raises InputError where there are none and made-up ones will not do.
    """
    vectors = spec.class_vectors
    if vectors is None:
        if spec.seen is not None and not config.allow_random:
            raise InputError("jfse: expected class vectors for a zero-shot task, got none (learner.allow_random=true "
                             "makes some up, which say nothing about unseen classes)")  # fmt: skip
        if config.width < spec.num_classes:
            raise InputError(f"learner.width: expected at least {spec.num_classes}, as many as there are classes "
                             f"without vectors of their own, got {config.width}")  # fmt: skip
        vectors = orthonormal(spec.num_classes, config.width, config.class_seed)
    vectors = vectors.float()
    if config.embedding == "linear":
        return unit_rows(vectors)
    low, high = vectors.amin(0), vectors.amax(0)
    return (vectors - low) / torch.where(high > low, high - low, 1.0)


class Embedded(NamedTuple):
    """Embeddings of n items: per modality [n_m, s], and the item each row belongs to. labels [n, C], c [n, s]."""

    embeddings: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    labels: Tensor
    c: Tensor

    def cycle(self) -> Tensor:
        """L_CYC."""
        return cycle_loss(list(self.embeddings.values()), [self.c[self.rows[m]] for m in self.embeddings])

    def pair(self, a: str, b: str) -> Pair:
        """Two of the modalities."""
        rows_a, rows_b = self.rows[a], self.rows[b]
        e_a, e_b = self.embeddings[a], self.embeddings[b]
        match = self.labels[rows_a].float() @ self.labels[rows_b].float().T > 0
        if len(rows_a) == len(rows_b) == len(self.labels):  # every item has both
            return Pair(e_a, e_b, match, (e_a, e_b))
        common = (e_a[torch.isin(rows_a, rows_b)], e_b[torch.isin(rows_b, rows_a)])
        return Pair(e_a, e_b, match, common)


class Stage(NamedTuple):
    """What stays the same in a stage of training: the client's modalities, classes to imagine [k], and randomness."""

    held: tuple[str, ...]
    imagined: Tensor
    rng: Generator


class JFSE(NeuralLearner):
    """The learner. Its parameters: `regressors.`, `generators.` and `critics.<modality>.`, and `discriminator.`.

    Those that a switched-off term would train do not exist; the others start the same under every switch.
    """

    Config = JFSEConfig

    def __init__(self, config: JFSEConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._config = config
        self._modalities = sorted(spec.dims)
        self._device = device
        self._class_vectors = class_targets(config, spec).to(device)
        self._seen = None if spec.seen is None else spec.seen.to(device)
        parameters = layers(self._sizes(spec), rng, device)
        for m in self._modalities:
            critic = Critic.drawn(spec.dims[m], self._class_vectors.shape[1], config.hidden, rng, device)
            parameters |= {f"critics.{m}.{part}": tensor for part, tensor in critic._asdict().items()}
        parameters = {name: tensor for name, tensor in parameters.items() if self._used(name)}
        self._network = Network(parameters, config.optimizer, config.keep_optimizer)
        self._epochs = torch.zeros((), device=device)  # that were trained, for the ramp
        last = config.layers - 1
        self.common = frozenset(
            f"regressors.{m}.{last}.{part}" for m in self._modalities for part in ("weight", "bias")
        )
        self.trainable = frozenset(parameters)

    @classmethod
    def remarks(cls, config: JFSEConfig, spec: DataSpec) -> tuple[str, ...]:
        """What a report on this learner and such data should say."""
        if spec.class_vectors is not None:
            return ()
        made_up = f"made-up orthonormal ones (seed {config.class_seed}) stand in, which say nothing about the classes"
        return (f"jfse: the data set has no class vectors; {made_up}",)

    def owned(self, held: Collection[str]) -> frozenset[str]:
        """The networks of what is held. L_ADV and L_DA need two modalities: alone, one has no use for the rest."""
        several = len(held) > 1

        def trains(name: str) -> bool:
            kind, modality, *_ = name.split(".")
            match kind:
                case "discriminator":
                    return several
                case "regressors":
                    return modality in held and (several or self._config.lambda_ > 0)
                case _:
                    return modality in held

        return frozenset(filter(trains, self.trainable))

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        """Train for some epochs. Reports L_CYC of true features, which is >= 0 as the critics' losses are not.

        Whatever the weights, it is the mean squared error of a coordinate, summed over modalities: of those a batch
        has, times the number of all over theirs. So a client with one modality of two and one with both are comparable.
        Items of no class or of an unseen one are left out.
        """
        config = self._config
        losses = Losses(self._device)
        data = self._usable(data.to(self._device))
        stage = Stage(data.modalities, self._imagined(data), rng)
        before = int(self._epochs)
        with self._network.training(proximal) as step:
            for epoch in range(before, before + epochs):
                reversal = 2 / (1 + math.exp(-10 * epoch / config.ramp)) - 1 if config.ramp else 1.0
                for index in batches(len(data), config.batch_size, rng, self._device, shuffle=config.shuffle):
                    batch = data.select(index)
                    if not batch.modalities:  # nobody has seen these items
                        continue
                    c = self._targets(batch.labels)
                    if config.synthesis:
                        for loss in self._critic_losses(batch, c, rng):
                            step(loss)
                    loss, cycle = self._joint_loss(batch, c, stage, reversal)
                    if loss.requires_grad:  # not with one modality and neither cycle nor synthesis
                        step(loss)
                        losses.add(cycle * (len(self._modalities) / len(batch.modalities)), len(batch))
        fit = losses.fit()
        if fit.trained:
            self._epochs += epochs
        return fit

    def _live(self) -> dict[str, Tensor]:
        return self._network.live() | {"epochs": self._epochs}

    # what exists

    def _sizes(self, spec: DataSpec) -> dict[str, tuple[int, int]]:
        """Every layer there can be, but for the critics' -> (inputs, outputs), in the order they are drawn in."""
        config, s = self._config, self._class_vectors.shape[1]
        sizes: dict[str, tuple[int, int]] = {}
        for m in self._modalities:
            widths = [spec.dims[m], *[config.hidden] * (config.layers - 1), s]
            sizes |= {f"regressors.{m}.{i}": size for i, size in enumerate(pairwise(widths))}
        for m in self._modalities:
            sizes[f"generators.{m}.0"] = (s + config.noise, config.hidden)
            sizes[f"generators.{m}.1"] = (config.hidden, spec.dims[m])
        widths = [s, *config.discriminator, max(len(self._modalities) - 1, 1)]
        sizes |= {f"discriminator.{i}": size for i, size in enumerate(pairwise(widths))}
        return sizes

    def _used(self, name: str) -> bool:
        kind = name.partition(".")[0]
        return {"generators": self._config.synthesis, "critics": self._config.synthesis,
                "discriminator": self._config.gamma > 0}.get(kind, True)  # fmt: skip

    # what is trained on

    def _usable(self, data: Items) -> Items:
        """The items of some class, and of no unseen one."""
        usable = data.labels.any(1)
        if self._seen is not None:
            usable &= ~(data.labels & ~self._seen).any(1)
        return data if bool(usable.all()) else data.select(usable.nonzero().flatten())

    def _imagined(self, data: Items) -> Tensor:
        """The classes that are synthesised without true items, [k] int64 on the CPU."""
        match self._config.imagine:
            case "unseen" if self._seen is not None:
                classes = ~self._seen
            case "missing":
                classes = ~data.labels.any(0)
            case _:
                return torch.empty(0, dtype=torch.int64)
        return classes.nonzero().flatten().cpu()

    def _targets(self, labels: Tensor) -> Tensor:
        """[n, C] bool -> [n, s]: the mean of the items' class vectors."""
        return labels.float() @ self._class_vectors / labels.sum(1, keepdim=True)

    # the networks

    def _embed(self, modality: str, x: Tensor) -> Tensor:
        last = self._config.layers - 1
        for layer in range(last):
            x = self._network.linear(f"regressors.{modality}.{layer}", x).relu()
        e = self._network.linear(f"regressors.{modality}.{last}", x)
        return e.relu() if self._config.embedding == "relu" else e

    def _generate(self, modality: str, c: Tensor, rng: Generator) -> Tensor:
        """G(c, z) with noise drawn from rng: [n, s] -> [n, d]."""
        noise = torch.randn(len(c), self._config.noise, generator=rng).to(self._device)
        hidden = self._network.linear(f"generators.{modality}.0", torch.cat([c, noise], dim=1))
        x = self._network.linear(f"generators.{modality}.1", F.leaky_relu(hidden, SLOPE))
        return x.relu() if self._config.features == "relu" else x

    def _critic(self, modality: str) -> Critic:
        return Critic(*(self._network.parameters[f"critics.{modality}.{part}"] for part in Critic._fields))

    def _discriminate(self, e: Tensor) -> Tensor:
        for layer in (0, 1):
            e = F.leaky_relu(self._network.linear(f"discriminator.{layer}", e), SLOPE)
        return self._network.linear("discriminator.2", e)

    # the losses

    def _critic_losses(self, batch: Items, c: Tensor, rng: Generator) -> Iterator[Tensor]:
        """The critics' loss, eq. 3, of each of their steps; a step is taken before the next is asked for."""
        steps = self._config.critic_steps
        of_item = {m: c[batch.rows[m]] for m in batch.modalities}
        with torch.no_grad():  # the generators rest meanwhile
            synthetic = {
                m: torch.split(self._generate(m, of_m.repeat(steps, 1), rng), len(of_m)) for m, of_m in of_item.items()
            }
        for i in range(steps):
            terms = []
            for m, of_m in of_item.items():
                mix = torch.rand(len(of_m), 1, generator=rng).to(self._device)
                real = batch.features[m].float()
                terms.append(critic_loss(self._critic(m), real, synthetic[m][i], of_m, mix, self._config.penalty))
            yield torch.stack(terms).sum()

    def _joint_loss(self, batch: Items, c: Tensor, stage: Stage, reversal: float) -> tuple[Tensor, Tensor]:
        """Eq. 16 but for the critics' steps, and L_CYC of true features."""
        embeddings = {m: self._embed(m, batch.features[m].float()) for m in batch.modalities}
        true = Embedded(embeddings, batch.rows, batch.labels, c)
        cycle = true.cycle()
        loss = self._embedding_loss(true, cycle, reversal)
        if self._config.synthesis:
            loss = loss + self._synthetic_loss(batch.labels, stage, reversal, critics=True)
            if len(stage.imagined):
                chosen = stage.imagined[torch.randint(len(stage.imagined), (len(batch),), generator=stage.rng)]
                labels = F.one_hot(chosen, batch.labels.shape[1]).bool().to(self._device)
                loss = loss + self._synthetic_loss(labels, stage, reversal, critics=False)
        return loss, cycle

    def _synthetic_loss(self, labels: Tensor, stage: Stage, reversal: float, *, critics: bool) -> Tensor:
        """L_synthetic of items with these labels [n, C], less E D(x~, c) if `critics`.

        Its gradient comes to the regressors times `synthetic`, to the generators times `generator`.
        """
        config = self._config
        labels = labels.repeat(config.copies, 1)
        c = self._targets(labels)
        embeddings, terms = {}, []
        for m in stage.held:
            x = self._generate(m, c, stage.rng)
            if critics:
                terms.append(-self._critic(m).frozen()(x, c).mean())
            e = self._embed(m, scale_gradient(x, config.generator / config.synthetic))
            embeddings[m] = scale_gradient(e, config.synthetic)
        everything = torch.arange(len(labels), device=self._device)
        synthetic = Embedded(embeddings, dict.fromkeys(stage.held, everything), labels, c)
        return torch.stack([*terms, self._embedding_loss(synthetic, synthetic.cycle(), reversal)]).sum()

    def _embedding_loss(self, embedded: Embedded, cycle: Tensor, reversal: float) -> Tensor:
        """L = beta L_DA + gamma L_ADV + lambda L_CYC; the gradient of L_ADV is reversed before the discriminator."""
        config = self._config
        terms = [config.lambda_ * cycle] if config.lambda_ else []
        if len(embedded.embeddings) > 1:
            if config.gamma:
                logits = [self._discriminate(scale_gradient(e, -reversal)) for e in embedded.embeddings.values()]
                terms.append(
                    config.gamma * modality_loss(logits, [self._modalities.index(m) for m in embedded.embeddings])
                )
            if config.beta and config.alignment:
                pairs = [embedded.pair(a, b) for a, b in combinations(embedded.embeddings, 2)]
                terms += [config.beta * SCHEMES[scheme](pair) for scheme in config.alignment for pair in pairs]
        return torch.stack(terms).sum() if terms else cycle.new_zeros(())
