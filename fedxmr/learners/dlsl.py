"""DLSL: discriminative latent space learning (Zheng, Wang and Li, IEEE Signal Processing Letters 2021).

Every modality has a dictionary; an item has one code, from which all its modalities and its labels are reconstructed:

    min  sum over modalities m of w_m |X_m - D_m Z|^2 + w_l |H - U Z|^2 + r |Z|^2,   columns of D_m and U <= `col_norm`

with X_m [d_m, n] the features, H [C, n] the labels and Z [k, n] the codes. An epoch is a round of block-coordinate
descent: Z by ridge regression, then every D_m and U exactly (`dictionaries.py`), so the sum never rises. Retrieval
codes a feature by its own dictionary, z = (D'D + gamma I)^-1 D'x, and ranks by the cosine.

All is float64, and nothing is drawn but the start. Where paper and authors' code (pineapple0422/DLSL, commit ca395b7)
part, or are silent:
- Of scaling the paper says nothing. Where a data set recommends to standardise, features are centred and divided by one
  number (`isotropic`) unless `dataset.scaling` says otherwise: k atoms go to where most of the squares are, and where
  every column has the same variance (principal components, standardised) that is noise. On Wikipedia's CNN features
  mAP is .16 standardised and .32 isotropic. Where columns are of different units, standardise: on mfeat .53 and .46.
- The ridge r on Z is the code's (`ridge`); eq. 3 has none, and is singular where atoms are more than dimensions.
- As eq. 3 stacks them, and the code, alpha and beta act squared (`stack: paper`); in eq. 2 they stand as they are.
- Columns are at most 1 long, as in the paper; the code's call takes gamma, 0.1, for that bound (`col_norm: 0.1`).
- k = 20, 100 iterations and the start (uniform, centred, unit columns) are the code's.
- Of M modalities the first by name has weight 1 and every other alpha, unless `weights` says otherwise.
- `pairing: class_mean`, the subcategory-specific task: who belongs with whom is taken from the class alone. Every
  feature row is an item of its own, whose other modalities are its class's means on this client (of several classes,
  the mean of their means). The code has such items of images only. It is the default where no item has two modalities.
- An item's missing modalities, and by class means those its classes lack, are left out of its own sum. An item of no
  class has labels that are all 0; one that nobody has seen rests.
- Reported is the sum per item, each modality's part as a mean over the items that have it; modalities that a client
  lacks count as if they cost, for their weight, what its own do. The proximal term is left out.

Federation. Codes and dictionaries are what they are up to a rotation, so all of D_m and U spans the common space: U
alone transfers nothing. `load` scales averaged and extrapolated columns back to the bound. An epoch solves for them
anew, so FedCMR's enhancement on a fifth of the items forgets much of what was merged. On Wikipedia, with three clients,
mAP is .197 on SIFT and .237 on CNN features with it, .226 and .318 without (`strategy.joint_fraction=1`), .219 and .289
alone, .228 and .323 pooled. FedProx is in closed form: mu/2 |D - D_t|^2 beside w |X - D Z|^2 / n adds mu/2 I to w A and
mu/2 D_t to w B, of each dictionary.

`share: statistics`, the exact way. For each dictionary the state has A = Z Z' / n and B = X Z' / n of the last epoch, n
the client's items; their means weighted by n are A and B of all items together. `load` of these without the dictionary
solves for it, alike on everybody. With FedAvg, `federation.epochs=1` and paired items every round is then one of
centralised training, whoever has which classes, items or modalities: of a modality only its owners share, and A and B
times one factor have the same solution. No code is in the state or kept, but A and B of one item tell that item, and of
fewer items than k much of them. Rounding shows as 1e-12, or as 1e-7 where all clients together have fewer items than k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from fedxmr.learners.cosine import cosine
from fedxmr.learners.dictionaries import coordinate_descent, lagrange_dual, project, residual
from fedxmr.learners.training import Losses, restore, snapshot
from fedxmr.types import DataSpec, Fit, Items, Proximal, State

SOLVERS = {"dual": lagrange_dual, "coordinate": coordinate_descent}

_MAP = "map"
_CHUNK = 4096
"""Items encoded at a time: float64 copies of their features need memory too."""


class DLSLConfig(BaseModel):
    """DLSL's options. Defaults are the paper's, and the code's where the paper is silent, but for `col_norm`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    width: int = Field(20, ge=1, le=1 << 14, description="k, atoms of each dictionary: the width of the common space")
    alpha: float = Field(0.1, gt=0, description="weight of every modality but the first by name; grid .001 to 10")
    beta: float = Field(0.1, ge=0, description="weight of the labels; grid .001 to 10; 0: the ablation without them")
    gamma: float = Field(0.1, ge=1e-8, description="ridge on retrieval codes; the paper's grid is .001 to 10")
    ridge: float = Field(0.1, ge=1e-8, description="ridge on training codes")
    weights: dict[str, float] = Field({}, description="modality -> its weight in place of 1 or alpha")
    stack: Literal["paper", "sqrt"] = Field(
        "paper", description="weights act squared, as eq. 3 stacks them, or as they are, as in eq. 2"
    )
    col_norm: float = Field(1.0, gt=0, description="longest column of a dictionary; 1 in the paper, 0.1 in the code")
    pairing: Literal["instance", "class_mean"] | None = Field(
        None, description="who belongs together: an item's features, or a class's; null: a class's if no item has two"
    )
    solver: Literal["dual", "coordinate"] = Field(
        "dual",
        description="for the dictionaries: one solution, two ways; coordinate is slow, and cut short at 2000 sweeps",
    )


class _Block(NamedTuple):
    """What one dictionary has to reconstruct: x [n_b, d] float64 of the items at rows [n_b]."""

    name: str
    weight: float
    x: Tensor
    rows: Tensor


class DLSL:
    """The learner: `dictionaries.<modality>` [d, k], `map` [C, k]; of each, `statistics.<name>.gram` and `.cross`."""

    Config = DLSLConfig
    scaling: ClassVar[Mapping[str, str]] = {"standardise": "isotropic"}

    by_class = frozenset({_MAP})

    def __init__(self, config: DLSLConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._config = config
        self._device = device
        modalities = sorted(spec.dims)
        self._weights = _weights(config, modalities)
        sizes = {_dictionary(m): spec.dims[m] for m in modalities} | {_MAP: spec.num_classes}
        self._dictionaries = {name: _start(d, config, rng).to(device) for name, d in sizes.items()}
        self._statistics: dict[str, Tensor] = {}
        for name, d in sizes.items():
            for statistic, rows in zip(_statistics(name), (config.width, d), strict=True):
                self._statistics[statistic] = torch.zeros(rows, config.width, dtype=torch.float64, device=device)
        self.common = self.trainable = frozenset(self._dictionaries)
        self.statistics = frozenset(self._statistics)

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:  # noqa: ARG002
        """Alternate codes and dictionaries; a function of the data alone. See above for what is reported."""
        losses = Losses(self._device)
        if not epochs or not data.modalities:
            return losses.fit()
        pull = self._pull(proximal)
        blocks, items = self._blocks(data.to(self._device))
        held = _held(blocks, items)
        squares = {block.name: block.x.square().sum() for block in blocks}
        for _ in range(epochs):
            codes = self._codes(blocks, held)
            for block in blocks:
                self._learn(block, codes[block.rows], len(data), pull)
            losses.add(self._objective(blocks, squares, codes, len(data)), 1)
        return losses.fit()

    def owned(self, held: Collection[str]) -> frozenset[str]:
        """The held modalities' dictionaries, the map, and their statistics."""
        names = {_dictionary(m) for m in held} & self.trainable
        if not names:
            return frozenset()
        names.add(_MAP)
        return frozenset(names.union(*map(_statistics, names)))

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d] features -> [n, k] float32 codes by the modality's own dictionary (eq. 10 and 11), on the device."""
        dictionary = self._dictionaries[_dictionary(modality)]
        gram = dictionary.T @ dictionary + self._config.gamma * self._eye()
        coder = torch.cholesky_solve(dictionary.T, torch.linalg.cholesky(gram)).T
        parts = [part.to(self._device, torch.float64) @ coder for part in torch.split(x, _CHUNK)]
        return torch.cat(parts).float()

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:  # noqa: ARG002
        """Cosines, [q, k] and [g, k] -> [q, g]; the direction does not matter."""
        return cosine(query, gallery)

    def state(self, names: Collection[str] | None = None) -> State:
        """Dictionaries and the statistics of the last epoch, copied; or some names of them."""
        live = self._dictionaries | self._statistics
        return snapshot(live if names is None else {name: live[name] for name in names})

    def load(self, state: State) -> None:
        """Take over part or all of a state; ValueError, loading nothing, where a name, shape or dtype is wrong.

        Columns that are too long are scaled down. Where statistics come without their dictionary, it is solved for;
        of statistics that are still zero it stays as it is.
        """
        restore(self._dictionaries | self._statistics, state)
        for name, dictionary in self._dictionaries.items():
            if name in state:
                dictionary.copy_(project(dictionary, self._config.col_norm))
            elif state.keys() & set(_statistics(name)):
                gram, cross = (self._statistics[statistic] for statistic in _statistics(name))
                if bool(gram.any()):
                    dictionary.copy_(self._solve(gram, cross))

    def _blocks(self, data: Items) -> tuple[list[_Block], int]:
        """What is to be reconstructed of the items that somebody has seen, and how many there are."""
        seen = torch.unique(torch.cat([data.rows[m] for m in data.modalities]))
        if len(seen) < len(data):
            data = data.select(seen)
        pairing = self._config.pairing or ("instance" if _paired(data) else "class_mean")
        if pairing == "class_mean":
            data = paired_by_class(data)
        blocks = [
            _Block(name, self._weights[name], data.features[m].double(), data.rows[m])
            for m in data.modalities
            for name in [_dictionary(m)]
        ]
        everyone = torch.arange(len(data), device=self._device)
        blocks.append(_Block(_MAP, self._weights[_MAP], data.labels.double(), everyone))
        return blocks, len(data)

    def _codes(self, blocks: Sequence[_Block], held: Sequence[tuple[Sequence[_Block], Tensor]]) -> Tensor:
        """Z' [n, k] of eq. 3 with the ridge; one factorisation for all items that have the same modalities."""
        n = sum(len(rows) for _, rows in held)
        right = torch.zeros(n, self._config.width, dtype=torch.float64, device=self._device)
        for block in blocks:
            right.index_add_(0, block.rows, block.x @ self._dictionaries[block.name], alpha=block.weight)
        codes = torch.empty_like(right)
        for theirs, rows in held:
            gram = self._config.ridge * self._eye()
            for block in theirs:
                gram += block.weight * self._dictionaries[block.name].T @ self._dictionaries[block.name]
            codes[rows] = torch.cholesky_solve(right[rows].T, torch.linalg.cholesky(gram)).T
        return codes

    def _learn(self, block: _Block, codes: Tensor, n: int, pull: tuple[float, State]) -> None:
        """A and B of one dictionary, and the dictionary (eq. 5, 7 and 9)."""
        gram, cross = (self._statistics[statistic] for statistic in _statistics(block.name))
        gram.copy_(codes.T @ codes / n)
        cross.copy_(block.x.T @ codes / n)
        mu, anchor = pull
        if mu and block.name in anchor:
            towards = anchor[block.name].to(self._device)
            gram = block.weight * gram + mu / 2 * self._eye()
            cross = block.weight * cross + mu / 2 * towards
        self._dictionaries[block.name].copy_(self._solve(gram, cross))

    def _solve(self, gram: Tensor, cross: Tensor) -> Tensor:
        return SOLVERS[self._config.solver](gram, cross, self._config.col_norm)

    def _objective(self, blocks: Sequence[_Block], squares: Mapping[str, Tensor], codes: Tensor, n: int) -> Tensor:
        """The sum that is minimised, per item, at codes Z and the dictionaries after them."""
        costs = {}
        for block in blocks:
            gram, cross = (self._statistics[statistic] for statistic in _statistics(block.name))
            part = residual(gram, cross, self._dictionaries[block.name], squares[block.name] / n)
            costs[block.name] = block.weight * part * n / len(block.rows)
        labels = costs.pop(_MAP)
        lacking = sum(w for name, w in self._weights.items() if name not in costs and name != _MAP)
        as_if = 1 + lacking / sum(self._weights[name] for name in costs)
        features = torch.stack(list(costs.values())).sum()
        return as_if * features + labels + self._config.ridge * codes.square().sum() / len(codes)

    def _pull(self, proximal: Proximal | None) -> tuple[float, State]:
        """FedProx's mu and anchor. ValueError where statistics are shared: nothing then holds on to parameters."""
        if proximal is None:
            return 0.0, {}
        if strange := sorted(proximal.anchor.keys() - self.trainable):
            raise ValueError(f"FedProx pulls at dictionaries, expected them to be shared, got {', '.join(strange)}")
        return proximal.mu, proximal.anchor

    def _eye(self) -> Tensor:
        return torch.eye(self._config.width, dtype=torch.float64, device=self._device)


def paired_by_class(data: Items) -> Items:
    """Every feature row as an item of its own, whose other modalities are the means of its class.

    Of several classes, the mean of those of them that have one; of none, it lacks that modality.
    """
    own = {m: data.labels[data.rows[m]] for m in data.modalities}
    features: dict[str, list[Tensor]] = {m: [] for m in data.modalities}
    rows: dict[str, list[Tensor]] = {m: [] for m in data.modalities}
    first = 0
    for source in data.modalities:
        n = len(own[source])
        for m in data.modalities:
            x, has = data.features[m].double(), torch.ones(n, dtype=torch.bool, device=own[m].device)
            if m != source:
                members = own[m].double()
                means = members.T @ x / members.sum(0).clamp(min=1)[:, None]
                of = (own[source] & own[m].any(0)).double()
                has = of.any(1)
                x = (of @ means / of.sum(1).clamp(min=1)[:, None])[has]
            features[m].append(x)
            rows[m].append(first + has.nonzero().flatten())
        first += n
    return Items(
        {m: torch.cat(parts) for m, parts in features.items()},
        {m: torch.cat(parts) for m, parts in rows.items()},
        torch.cat([own[m] for m in data.modalities]),
    )


def _paired(data: Items) -> bool:
    """Whether any item has two modalities."""
    rows = torch.cat([data.rows[m] for m in data.modalities])
    return len(torch.unique(rows)) < len(rows)


def _held(blocks: Sequence[_Block], n: int) -> list[tuple[list[_Block], Tensor]]:
    """The blocks that n items have, and [i] which items these are, for each set of blocks that occurs."""
    there = torch.zeros(n, len(blocks), dtype=torch.bool, device=blocks[0].rows.device)
    for i, block in enumerate(blocks):
        there[block.rows, i] = True
    patterns, of = torch.unique(there, dim=0, return_inverse=True)
    return [
        ([block for block, has in zip(blocks, pattern, strict=True) if has], (of == i).nonzero().flatten())
        for i, pattern in enumerate(patterns.tolist())
    ]


def _weights(config: DLSLConfig, modalities: Sequence[str]) -> dict[str, float]:
    """The weight of each dictionary's squared error. ValueError for a weight that is none, or nobody's."""
    if strange := sorted(config.weights.keys() - set(modalities)):
        raise ValueError(f"learner.weights: expected some of {', '.join(modalities)}, got {', '.join(strange)}")
    if low := [f"{m}: {w}" for m, w in config.weights.items() if w <= 0]:
        raise ValueError(f"learner.weights: expected numbers above 0, got {', '.join(low)}")
    weights = {_dictionary(m): 1.0 if i == 0 else config.alpha for i, m in enumerate(modalities)}
    weights |= {_dictionary(m): w for m, w in config.weights.items()} | {_MAP: config.beta}
    return {name: w**2 if config.stack == "paper" else w for name, w in weights.items()}


def _start(rows: int, config: DLSLConfig, rng: Generator | None) -> Tensor:
    """[rows, k] as in the authors' code: uniform, centred, columns as long as they may be; rng None: to be loaded."""
    if rng is None:
        return torch.empty(rows, config.width, dtype=torch.float64)
    drawn = torch.rand(rows, config.width, generator=rng, dtype=torch.float64) - 0.5
    if rows > 1:  # one row would be zero
        drawn -= drawn.mean(0)
    length: Tensor = drawn.norm(dim=0)
    return drawn * (config.col_norm / length)


def _dictionary(modality: str) -> str:
    return f"dictionaries.{modality}"


def _statistics(name: str) -> tuple[str, str]:
    """The names of A and B of a dictionary."""
    return f"statistics.{name}.gram", f"statistics.{name}.cross"
