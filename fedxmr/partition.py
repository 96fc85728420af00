"""Dividing training items among clients: a pure function of (items, clients, config, seed).

A scheme says which client owns each item; no item goes to two clients and no client is left empty. Where a scheme
speaks of an item's class and the item has several, one of them is drawn for it; items without any are a further class.

iid: equal numbers at random. missing-modality: the same, but some clients lack a modality.
unpaired: the same, but of its items a client has the share `unpaired`, drawn at random and rounded, in one modality
only. The modalities take turns, on from client to client, so that of complete items any client's numbers by modality
differ by at most one; an item that lacks a modality itself takes its turn among those it has. What an item loses nobody
has: at 1 there is no pair anywhere, and of complete items in M modalities 1/M of the feature rows are left.
dirichlet: each class is shared out by Dirichlet(alpha) proportions (Yurochkin et al., ICML 2019; Li et al., ICDE 2022).
shards: few classes per client (McMahan et al., AISTATS 2017); here exactly k, in shards of about equal size.
quantity: every client has `min_items` at random, and the rest is shared out by Dirichlet(alpha) proportions.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedxmr.arrays import read_npz
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.types import Items

RETRIES = 100
"""How often a division is drawn before a client with too few items is an error."""

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class PartitionConfig(BaseModel):
    """How training items are divided among clients."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scheme: Literal["iid", "dirichlet", "shards", "quantity", "missing-modality", "unpaired"] = Field(
        "iid",
        description="iid: equal, at random; dirichlet: skewed classes; shards: few classes per client; "
        "quantity: skewed numbers of items; missing-modality: equal, but some clients lack a modality; "
        "unpaired: equal, but items have one modality each",
    )
    alpha: float = Field(
        0.5, ge=1e-4, allow_inf_nan=False, description="dirichlet, quantity: concentration; 0.1 very skewed, 100 even"
    )
    classes_per_client: int = Field(2, ge=1, description="shards: how many classes each client has")
    missing: float = Field(
        0.5, ge=0, le=1, description="missing-modality: share of the clients that lack one modality, taken in turns"
    )
    unpaired: float = Field(
        1.0, ge=0, le=1, description="unpaired: share of each client's items that have one modality only"
    )
    min_items: int = Field(1, ge=1, description="the fewest items a client may have")


@dataclass(frozen=True)
class Part:
    """What one client has of the training items.

    items: [n] int64, ascending: the training items it has in at least one modality.
    held: modality -> [n_m] int64, ascending, out of `items`: those it has in that modality.
    """

    items: Tensor
    held: Mapping[str, Tensor]

    def take(self, train: Items) -> Items:
        """The client's items, copied out of the training items (on the CPU): item j is training item items[j].

        Raises InputError where `train` cannot be what was divided: an item or one of its features is not there.
        """
        if len(self.items) and int(self.items[-1]) >= len(train):
            raise InputError(f"partition: expected items below {len(train)}, got {int(self.items[-1])}")
        features, rows = {}, {}
        for modality, x in train.features.items():
            held = self.held.get(modality, self.items[:0])
            at = torch.searchsorted(train.rows[modality], held)
            if len(held) and (int(at[-1]) >= len(x) or not train.rows[modality][at].equal(held)):
                raise InputError(f"partition: expected training items that have {modality}, got some without it")
            features[modality] = x[at]
            rows[modality] = torch.searchsorted(self.items, held)
        return Items(features, rows, train.labels[self.items])


def partition(train: Items, clients: int, config: PartitionConfig, seed: int) -> Sequence[Part]:
    """Divide the training items; those without any modality, or whose owner lacks all of theirs, are in no part.

    Returns one part per client, views of the same few arrays. Equal arguments give equal parts.
    Raises InputError where no division gives each client `min_items` items, naming a client and what to change.
    """
    has = {m: _contains(rows, len(train)) for m, rows in sorted(train.rows.items())}
    index = np.flatnonzero(np.any(list(has.values()), axis=0))
    if not 1 <= clients <= len(index) // config.min_items:
        raise InputError(
            f"clients: expected 1 to {len(index) // config.min_items}, as there are {len(index)} training items and "
            f"each client needs {config.min_items}, got {clients}"
        )
    rng = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator(seed, "partition"))))
    has = {m: mask[index] for m, mask in has.items()}
    draw = _Draw(_one_class_each(train.labels[torch.from_numpy(index)], rng), has, clients, config, rng)
    scheme = _SCHEMES[config.scheme]
    for _ in range(RETRIES):
        owner, held = scheme.divide(draw)
        kept = np.any(list(held.values()), axis=0)
        sizes = np.bincount(owner[kept], minlength=clients)
        if sizes.min() >= config.min_items:
            order = np.flatnonzero(kept)[owner[kept].argsort(kind="stable")]  # by client, ascending within each
            return _parts(index[order], sizes, {m: mask[order] for m, mask in held.items()})
    raise InputError(
        f"partition {config.scheme}: expected {config.min_items} items or more for each of {clients} clients, "
        f"got {sizes.min()} for client {sizes.argmin()} in the last of {RETRIES} draws; {scheme.remedy}"
    )


def save_partition(path: Path, parts: Sequence[Part]) -> None:
    """Write parts to one .npz, whole or not at all.

    items: [N] int64, all clients' items one after the other. offsets: [clients + 1] int64: client k has
    items[offsets[k]:offsets[k + 1]]. held/<modality>: [N] bool, whether the client has the item in that modality.
    """
    modalities = sorted({modality for part in parts for modality in part.held})
    arrays = {
        "items": torch.cat([part.items for part in parts]).numpy(),
        "offsets": np.cumsum([0, *(len(part.items) for part in parts)], dtype=np.int64),
    }
    for modality in modalities:
        masks = [torch.isin(part.items, part.held.get(modality, part.items[:0])) for part in parts]
        arrays[f"held/{modality}"] = torch.cat(masks).numpy()
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as opened:
        np.savez(opened, allow_pickle=False, **arrays)  # noqa: TID251 - without pickle
    unfinished.replace(path)


def load_partition(path: Path) -> Sequence[Part]:
    """Read what save_partition wrote. Raises InputError for a file that is missing, damaged or something else."""
    try:
        arrays = read_npz(path, path.stat().st_size)  # it is not compressed
        items, offsets = arrays["items"], arrays["offsets"]
        held = {name.removeprefix("held/"): mask for name, mask in arrays.items() if name.startswith("held/")}
    except Exception as error:  # whatever reading damaged bytes trips on: BadZipFile, zlib.error, KeyError ...
        raise InputError(f"{path}: expected a saved partition, got {type(error).__name__}: {error}") from error
    arrays_fit = all(a.ndim == 1 and a.dtype == np.int64 for a in (items, offsets)) and all(
        mask.dtype == np.bool_ and mask.shape == items.shape for mask in held.values()
    )
    if not arrays_fit or not len(offsets) or [offsets[0], offsets[-1]] != [0, len(items)]:
        raise InputError(f"{path}: expected items, offsets and held/<modality> that fit each other, got others")
    sizes = np.diff(offsets)
    within = np.ones(len(items), dtype=np.bool_)
    within[offsets[:-1][sizes > 0]] = False  # a client's first item follows another client's
    if (sizes < 0).any() or (items < 0).any() or (np.diff(items, prepend=-1)[within] <= 0).any():
        raise InputError(f"{path}: expected ascending items for each client, got others")
    return _parts(items, sizes, held)


def _parts(items: Ints, sizes: Ints, held: Mapping[str, Bools]) -> Sequence[Part]:
    """Views, client by client, of all clients' items [N] and of which are held [N] in each modality."""
    by_client = torch.from_numpy(items).split_with_sizes(sizes.tolist())
    ends = np.cumsum(sizes)
    held_by_client = {}
    for modality, mask in held.items():
        if mask.all():
            held_by_client[modality] = by_client
        else:
            held_sizes = np.diff(np.append(0, np.cumsum(mask))[ends], prepend=0)
            held_by_client[modality] = torch.from_numpy(items[mask]).split_with_sizes(held_sizes.tolist())
    return [Part(own, {m: h[k] for m, h in held_by_client.items()}) for k, own in enumerate(by_client)]


def _contains(rows: Tensor, items: int) -> Bools:
    mask = np.zeros(items, dtype=np.bool_)
    mask[rows.numpy()] = True
    return mask


def _one_class_each(labels: Tensor, rng: np.random.Generator) -> Ints:
    """Labels [n, C] -> [n] a class for each item, drawn evenly from its own; C where it has none."""
    item, label = labels.nonzero().numpy().T
    shuffled = rng.permutation(len(item))
    classes = np.full(labels.shape[0], labels.shape[1], dtype=np.int64)
    classes[item[shuffled]] = label[shuffled]  # the last of an item's labels stays
    return classes


class _Draw(NamedTuple):
    """What a scheme is given: items of known classes [n], who has which modality [n] of them, and for whom they are."""

    classes: Ints
    has: Mapping[str, Bools]
    clients: int
    config: PartitionConfig
    rng: np.random.Generator


def _iid(draw: _Draw) -> Ints:
    owner = np.empty(len(draw.classes), dtype=np.int64)
    owner[draw.rng.permutation(len(owner))] = np.arange(len(owner)) % draw.clients
    return owner


def _dirichlet(draw: _Draw) -> Ints:
    owner = np.empty(len(draw.classes), dtype=np.int64)
    for members in _by_value(draw.classes):
        owner[draw.rng.permutation(members)] = _dirichlet_owners(len(members), draw)
    return owner


def _quantity(draw: _Draw) -> Ints:
    sure = np.repeat(np.arange(draw.clients), draw.config.min_items)
    owner = np.append(sure, _dirichlet_owners(len(draw.classes) - len(sure), draw))
    return draw.rng.permutation(owner)


def _dirichlet_owners(count: int, draw: _Draw) -> Ints:
    """[count] ascending clients, in numbers by proportions from Dirichlet(alpha, ..., alpha)."""
    alpha = draw.config.alpha
    # Gamma(alpha) = Gamma(alpha + 1) * U^(1 / alpha), in logarithms: a small alpha would underflow to 0 / 0
    uniform = 1 - draw.rng.random(draw.clients)
    log_gamma = np.log(draw.rng.standard_gamma(alpha + 1, draw.clients)) + np.log(uniform) / alpha
    share = np.exp(log_gamma - log_gamma.max())
    cuts = np.floor(np.cumsum(share / share.sum())[:-1] * count)
    return np.searchsorted(cuts, np.arange(count), side="right")


def _shards(draw: _Draw) -> Ints:
    members = _by_value(draw.classes)
    holders = _by_value(_choose_classes(_shards_per_class([len(m) for m in members], draw), draw).flatten())
    owner = np.empty(len(draw.classes), dtype=np.int64)
    for of_class, slots in zip(members, holders, strict=True):
        clients = draw.rng.permutation(slots // draw.config.classes_per_client)
        owner[draw.rng.permutation(of_class)] = clients[np.arange(len(of_class)) % len(clients)]
    return owner


def _shards_per_class(sizes: Sequence[int], draw: _Draw) -> Ints:
    """Into how many shards each class is cut, clients * k in all: the class with the largest shards is cut further."""
    clients, k = draw.clients, draw.config.classes_per_client
    if k > len(sizes):
        raise InputError(f"classes_per_client: expected at most the {len(sizes)} classes there are, got {k}")
    if clients * k < len(sizes):
        raise InputError(
            f"partition shards: expected {len(sizes)} shards or more, one per class, got {clients} clients x {k} "
            f"classes_per_client; raise classes_per_client to {-(-len(sizes) // clients)} or more"
        )
    most = [min(size, clients) for size in sizes]
    if clients * k > sum(most):
        raise InputError(
            f"partition shards: expected items for {clients} clients x {k} classes_per_client, got enough for "
            f"{sum(most)} such shards of one item or more; lower clients or classes_per_client"
        )
    shards = np.ones(len(sizes), dtype=np.int64)
    largest = [(-size, c) for c, size in enumerate(sizes) if most[c] > 1]
    heapq.heapify(largest)
    for _ in range(clients * k - len(sizes)):
        _, c = heapq.heappop(largest)
        shards[c] += 1
        if shards[c] < most[c]:
            heapq.heappush(largest, (-sizes[c] / shards[c], c))
    return shards


def _choose_classes(shards: Ints, draw: _Draw) -> Ints:
    """[clients, k] different classes for each client, at random, class c being chosen shards[c] times in all."""
    k = draw.config.classes_per_client
    chosen = np.empty((draw.clients, k), dtype=np.int64)
    left = shards.astype(np.float64)
    for client in draw.rng.permutation(draw.clients):
        # the k classes with most shards left: no class can then be left with more shards than clients
        chosen[client] = np.argpartition(left + draw.rng.random(len(left)), -k)[-k:]
        left[chosen[client]] -= 1
    return chosen


def _by_value(values: Ints) -> list[Ints]:
    """For each value that occurs, ascending: the positions where it does."""
    order = values.argsort(kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


_Division = tuple[Ints, Mapping[str, Bools]]
"""The client of each item [n], and modality -> whether that client has it [n]."""


def _whole(owners: Callable[[_Draw], Ints]) -> Callable[[_Draw], _Division]:
    """The division in which clients have all there is of their items."""
    return lambda draw: (owners(draw), draw.has)


def _missing_modality(draw: _Draw) -> _Division:
    """Of a seeded order of clients the first take turns in lacking a modality."""
    modalities = _several_modalities(draw)
    affected = draw.rng.permutation(draw.clients)[: round(draw.config.missing * draw.clients)]
    lacks = {m: np.zeros(draw.clients, dtype=np.bool_) for m in draw.has}
    for turn, modality in enumerate(modalities):
        lacks[modality][affected[turn :: len(modalities)]] = True
        if lacks[modality].all():
            raise InputError(
                f"partition missing-modality: expected a client that keeps {modality}, got none of {draw.clients} "
                f"at missing={draw.config.missing}; lower missing or raise clients"
            )
    owner = _iid(draw)
    return owner, {m: mask & ~lacks[m][owner] for m, mask in draw.has.items()}


def _unpaired(draw: _Draw) -> _Division:
    """A share of each client's items loses all modalities but one, which take turns."""
    modalities = _several_modalities(draw)
    owner = _iid(draw)
    order = draw.rng.permutation(len(owner))
    order = order[owner[order].argsort(kind="stable")]  # by client, at random within each
    sizes = np.bincount(owner, minlength=draw.clients)
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    single = order[place < np.repeat(np.rint(draw.config.unpaired * sizes), sizes)]
    has = np.stack([draw.has[m][single] for m in modalities])
    turn = np.arange(len(single)) % has.sum(0)  # among the modalities each of them has
    only = has & (has.cumsum(0) - 1 == turn)
    held = {m: mask.copy() for m, mask in draw.has.items()}
    for modality, mask in zip(modalities, only, strict=True):
        held[modality][single] = mask
    return owner, held


def _several_modalities(draw: _Draw) -> Sequence[str]:
    """The modalities that some item has, sorted. Raises InputError where there are fewer than two."""
    found = [m for m, mask in draw.has.items() if mask.any()]
    if len(found) < 2:
        raise InputError(f"partition {draw.config.scheme}: expected two modalities or more, got {found}")
    return found


class _Scheme(NamedTuple):
    divide: Callable[[_Draw], _Division]
    remedy: str


_SCHEMES: Mapping[str, _Scheme] = {
    "iid": _Scheme(_whole(_iid), "lower clients or min_items"),
    "dirichlet": _Scheme(_whole(_dirichlet), "raise alpha, or lower clients or min_items"),
    "shards": _Scheme(_whole(_shards), "lower clients or min_items"),
    "quantity": _Scheme(_whole(_quantity), "lower clients or min_items"),
    "missing-modality": _Scheme(_missing_modality, "lower missing, clients or min_items"),
    "unpaired": _Scheme(_unpaired, "lower clients or min_items"),
}
