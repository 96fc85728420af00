"""The values that pass between the parts: items, what a learner may know of them, and what it reports."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel
from torch import Generator, Tensor

State = dict[str, Tensor]
"""Dotted names to CPU tensors: detached, and copies of whatever they were taken from."""


@dataclass(frozen=True)
class Items:
    """n items seen through M modalities; an item may lack any of them, and nothing is stored for what it lacks.

    features: modality -> [n_m, d_m] float.
    rows: modality -> [n_m] int64, strictly increasing: the item each feature row belongs to.
    labels: [n, C] bool, multi-hot, also where every item has exactly one class.
    """

    features: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    labels: Tensor

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.dtype != torch.bool:
            raise ValueError(f"labels: expected [n, C] bool, got {list(self.labels.shape)} {self.labels.dtype}")
        if set(self.features) != set(self.rows):
            raise ValueError(f"features are of {sorted(self.features)} but rows of {sorted(self.rows)}")
        for modality, x in self.features.items():
            rows = self.rows[modality]
            if x.ndim != 2 or rows.shape != x.shape[:1] or rows.dtype != torch.int64:
                raise ValueError(
                    f"{modality}: expected [n, d] features and [n] int64 rows, "
                    f"got {list(x.shape)} and {list(rows.shape)} {rows.dtype}"
                )

    @classmethod
    def paired(cls, features: Mapping[str, Tensor], labels: Tensor) -> Items:
        """Items of which every one has every modality."""
        return cls(features, {modality: torch.arange(len(x)) for modality, x in features.items()}, labels)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities at least one item has, sorted."""
        return tuple(sorted(m for m, x in self.features.items() if len(x)))

    @cached_property
    def _feature_row(self) -> Mapping[str, Tensor | None]:
        """Modality -> [n] the feature row of each item, -1 where it has none; None where item i is row i."""
        found: dict[str, Tensor | None] = {}
        for modality, rows in self.rows.items():
            if len(rows) == len(self):  # strictly increasing and complete: the identity
                found[modality] = None
                continue
            row = torch.full((len(self),), -1, dtype=torch.int64, device=rows.device)
            row[rows] = torch.arange(len(rows), device=rows.device)
            found[modality] = row
        return found

    def select(self, index: Tensor) -> Items:
        """The items at `index` [k] int64, in that order, no item twice; item j of the result is item index[j] here."""
        features, rows = {}, {}
        for modality, x in self.features.items():
            row_of_item = self._feature_row[modality]
            if row_of_item is None:
                features[modality] = x[index]
                rows[modality] = torch.arange(len(index), device=index.device)
            else:
                row = row_of_item[index]
                rows[modality] = (row >= 0).nonzero().flatten()
                features[modality] = x[row[rows[modality]]]
        return Items(features, rows, self.labels[index])

    def span(self, start: int, stop: int) -> Items:
        """The items from `start` up to `stop`, as views: nothing is copied but the numbers of their rows."""
        features, rows = {}, {}
        for modality, x in self.features.items():
            own = self.rows[modality]
            first, last = torch.searchsorted(own, torch.tensor([start, stop], device=own.device)).tolist()
            features[modality] = x[first:last]
            rows[modality] = own[first:last] - start
        return Items(features, rows, self.labels[start:stop])

    @contextmanager
    def lent(self, to: str) -> Iterator[Items]:
        """Themselves, for somebody who is to leave them as they are: RuntimeError naming `to` where a tensor changed.

        Many clients share the items they are evaluated on, and every round trains on the same ones.
        """
        tensors = [t for t in (*self.features.values(), *self.rows.values(), self.labels) if not t.is_inference()]
        before = [t._version for t in tensors]  # torch counts writes in place
        yield self
        if [t._version for t in tensors] != before:
            raise RuntimeError(f"{to} changed the items that it was given")

    def to(self, device: torch.device | str) -> Items:
        """The same items on a device."""
        return Items(
            {m: x.to(device) for m, x in self.features.items()},
            {m: rows.to(device) for m, rows in self.rows.items()},
            self.labels.to(device),
        )


@dataclass(frozen=True)
class DataSpec:
    """What a learner may know before it sees data.

    dims: modality -> feature width, of every modality of the data set, also those a client lacks.
    class_vectors: [C, k] float, for learners that use class semantics. seen: [C] bool, for zero-shot tasks.
    """

    dims: Mapping[str, int]
    num_classes: int
    class_vectors: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """What a stage of training reports.

    loss: mean per item over all epochs of the stage; finite and >= 0 unless training diverged: the server refuses it.
    loss_sum: the batches' mean losses summed over batches and epochs, as the FedCMR authors' code reports it.
    trained: False where this client could not train at all (one modality, say, where the learner needs two).
    """

    loss: float
    loss_sum: float
    trained: bool = True


@dataclass(frozen=True)
class Proximal:
    """FedProx's term mu/2 * ||w - anchor||^2 over the names in `anchor` (Li et al., MLSys 2020)."""

    mu: float
    anchor: State


class Encoder(Protocol):
    """What retrieval takes of a learner."""

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d_m] features -> [n, k] representations in the common subspace."""
        ...

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:
        """Outputs of `encode`, [q, k] and [g, k] -> [q, g], higher is closer."""
        ...


class Learner(Encoder, Protocol):
    """A cross-modal retrieval method. Pure torch: it knows no Flower, no files and no other client.

    Built as `cls(config, spec, device, rng)`. `rng` is a CPU generator from which the parameters of all modalities are
    drawn in sorted order, so one seed gives one initial state on every machine and client; None leaves them
    uninitialised, for a state that is loaded next.

    A class may also have
    - `remarks(config, spec) -> Sequence[str]`: what a run should say of the learner on such data;
    - `unshared: str`: why no strategy can share anything of it, as "is ..."; each client then learns alone;
    - `rounds: int`: how many a run has where nobody says;
    - `scaling: Mapping[str, str]`: how it wants features scaled where a data set recommends something else, such as
      {"standardise": "isotropic"}; what the configuration says goes before.
    """

    Config: ClassVar[type[BaseModel]]
    """The learner's options: frozen, validated, and the one place of their defaults."""
    common: frozenset[str]
    """Names that span the common subspace: what FedCMR shares."""
    trainable: frozenset[str]
    """Names of everything trained: what FedAvg and FedProx share."""
    statistics: frozenset[str]
    """Names of sufficient statistics, for closed-form learners; empty otherwise."""
    by_class: frozenset[str]
    """Names whose rows belong to classes (prototypes, say)."""

    def __init__(self, config: Any, spec: DataSpec, device: torch.device, rng: Generator | None) -> None: ...

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        """Train on `data` for some epochs; batches and noise come from `rng` (a CPU generator).

        0 epochs take no step, train nothing and change no other names than `by_class` ones: they set what depends on
        the first data a learner sees (prototypes that start at class means, say). A client asks for them with all its
        items before each round's W_0 is recorded, so where there is nothing to set they must cost next to nothing.
        """
        ...

    def owned(self, held: Collection[str]) -> frozenset[str]:
        """The names that a client holding these modalities trains; of none, none. Only these count in a mean."""
        ...

    def state(self, names: Collection[str] | None = None) -> State:
        """A copy of all that must survive a round, optimiser moments included, or of some names of it.

        Always the same names, also before the first training step.
        """
        ...

    def load(self, state: State) -> None:
        """Take over part or all of a state. An unknown name or a wrong shape raises ValueError, loading nothing."""
        ...
