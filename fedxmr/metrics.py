"""How well a ranking of the gallery answers the queries: mAP, Recall@K, nDCG@K and curves, in chunks, on the device.

One meaning for all of them. The whole gallery is ranked by score, higher first, and items with equal scores stand in one
seeded order of the gallery, the same for every method: the order in which the gallery is stored would reward a collapsed
model wherever the items are sorted by class. 0.0 and -0.0 are equal. An item is relevant if it shares a label with the
query. Queries with nothing relevant in the gallery are left out of the means, and counted.

Sources: average precision and interpolated precision as in Manning, Raghavan, Schuetze, "Introduction to Information
Retrieval" (2008), section 8.4; nDCG as in Jaervelin and Kekaelaeinen (TOIS 2002), with linear gain and log2(rank + 1).
Departs from the authors of the learners: multi-label codes of DSCMR and FedCMR cut the ranking at the number of queries,
which is the gallery only where the two are equal; single-label ones count a query with nothing relevant as 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Generator, Tensor

Scores = Callable[[slice], Tensor]
"""Gives the scores [b, g] of the queries in a slice, floating point, against the whole gallery; higher is closer."""

ApVariant = Literal["standard", "dlsl"]
"""`dlsl` divides by rank + 1, as the DLSL authors' main.m does by mistake: a hit at rank 1 counts .5. For their tables."""

WithoutRelevant = Literal["ignore", "zero"]
"""What a query with nothing relevant does to a mean: nothing, or enter it as 0."""

RECALL_LEVELS = tuple(tenth / 10 for tenth in range(11))
"""Where the precision-recall curve is read."""

CHUNK_SCORES = 1 << 22
"""About how many scores one call gives, 16 MB in float32: enough rows for an efficient matrix product."""

CACHED_SCORES = 1 << 19  # so many are ranked at a time on a CPU: the passes over 4 MB of keys stay in its cache


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Means over queries, for one set of queries and one gallery. A mean over no query is NaN.

    A K above the size of the gallery means the whole gallery; the key stays the K that was asked for.

    average_precision: [q] float64 on the CPU, of every query; NaN where it is left out. For bootstraps over queries.
    map: mAP@all.
    map_at: mAP@K, divided by the relevant items within K as in the authors' codes; 0 for a query with none there.
    precision_at: share of the top K that is relevant: the precision-scope curve.
    hit_at: share of queries with something relevant in the top K.
    ndcg_at: gain is the number of shared labels, the ideal is over the whole gallery.
    recall_at: share of queries whose own pair is in the top K, over the `paired` queries that have one; empty without pairs.
    precision_recall: interpolated precision at the RECALL_LEVELS; None unless asked for.
    queries: how many queries the means are over. left_out: how many have nothing relevant and are in no mean but recall_at.
    tied: share of the gallery whose score equals that of another item for the same query; mean over all queries.
    """

    average_precision: Tensor
    map: float
    map_at: Mapping[int, float]
    precision_at: Mapping[int, float]
    hit_at: Mapping[int, float]
    ndcg_at: Mapping[int, float]
    recall_at: Mapping[int, float]
    precision_recall: tuple[float, ...] | None
    queries: int
    left_out: int
    paired: int
    tied: float


def relevance(query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """[q, C] and [g, C] bool -> [q, g] bool: whether the two share at least one label."""
    _check_labels(query_labels, gallery_labels)
    return _shared(*_label_forms(query_labels, gallery_labels)).bool()


def tie_order(gallery_size: int, rng: Generator) -> Tensor:
    """[g] int64 permutation of the gallery: of two items with equal scores, the one that comes first in it ranks higher."""
    return torch.randperm(gallery_size, generator=rng, device=rng.device)


def ranking(scores: Tensor, order: Tensor) -> Tensor:
    """The definition of rank: scores [q, g], order [g] as from `tie_order` -> [q, g] gallery indices, best first."""
    return order[scores[:, order].argsort(dim=1, descending=True, stable=True)]


def average_precision(scores: Tensor, relevant: Tensor, order: Tensor, ap_variant: ApVariant = "standard") -> Tensor:
    """The definition of average precision: the mean, over the relevant items, of the precision at their ranks.

    scores [q, g]; relevant [q, g] bool; order [g] as from `tie_order`.
    Returns [q] float64, NaN for a query with nothing relevant. `retrieval` gives the same, in chunks and faster.
    """
    hit = relevant.gather(1, ranking(scores, order)).int()
    found, summed = _precision_sums(hit, ap_variant)
    return summed[:, -1] / found[:, -1]


def mean_average_precision(
    scores: Scores,
    query_labels: Tensor,
    gallery_labels: Tensor,
    *,
    order: Tensor,
    ap_variant: ApVariant = "standard",
    without_relevant: WithoutRelevant = "ignore",
) -> float:
    """mAP@all alone; `retrieval` without its options costs the same and also gives the counts and the share of ties."""
    found = retrieval(
        scores, query_labels, gallery_labels, order=order, ap_variant=ap_variant, without_relevant=without_relevant
    )
    return found.map


def retrieval(
    scores: Scores,
    query_labels: Tensor,
    gallery_labels: Tensor,
    *,
    order: Tensor,
    at: Sequence[int] = (),
    pairs: Tensor | None = None,
    curves: bool = False,
    ap_variant: ApVariant = "standard",
    without_relevant: WithoutRelevant = "ignore",
    chunk: int | None = None,
) -> Retrieval:
    """Rank the gallery for every query and measure the rankings.

    scores: called once per chunk with consecutive slices of the queries, so that no [q, g] matrix need exist.
        float16, bfloat16 and float32 scores are compared as float32, float64 ones as float64; all of this is exact.
    query_labels [q, C], gallery_labels [g, C]: bool; an item may have one label, several or none.
    order [g] int64: how ties are broken, from `tie_order`.
    at: the Ks of mAP@K, precision@K, Hit@K, nDCG@K and, with pairs, Recall@K.
    pairs [q] int64: the gallery index of each query's own pair, -1 where it has none and is left out of Recall@K.
    chunk: queries per call of `scores`; by default from the size of the gallery. Changes no metric by a single bit.

    Raises ValueError for an empty gallery or no queries, for shapes that do not fit, for a K below 1, for an order that is
    no permutation, and for scores that are not floating point or contain NaN. Infinite scores are ranked.
    """
    _check_labels(query_labels, gallery_labels)
    _check_choices(at, ap_variant, without_relevant, chunk)
    queries, size = len(query_labels), len(gallery_labels)
    _check_gallery(queries, size, order, pairs)
    query_form, gallery_form = _label_forms(query_labels, gallery_labels)
    tie_rank = torch.empty_like(order)
    tie_rank[order] = torch.arange(size, device=order.device)

    tied = 0
    columns: defaultdict[str, list[Tensor]] = defaultdict(list)  # name -> per block [b] or [b, k] float64, CPU
    for rows, block in _blocks(scores, queries, size, chunk or max(1, CHUNK_SCORES // size)):
        order, tie_rank, gallery_form = (x.to(block.device) for x in (order, tie_rank, gallery_form))
        shared = _shared(query_form[rows].to(block.device), gallery_form)
        all_keys = _sorted_keys(block, shared.bool(), order, tie_rank)
        for part in _parts(all_keys, CACHED_SCORES):
            keys = all_keys[part]
            measured = _measure_hits(keys.int() & 1, at, curves, ap_variant)
            tied += _count_tied(keys)
            if at:
                top = order[(keys[:, : max(at)] & _LOW) >> 1]
                measured["ndcg"] = _ndcg(shared[part], top, at)
                if pairs is not None:
                    own = top == pairs[rows][part, None].to(block.device)
                    measured["recall"] = own.cumsum(1)[:, _last(at, size)].double()
            for name, value in measured.items():
                columns[name].append(value.cpu())
    table = {name: torch.cat(chunks) for name, chunks in columns.items()}
    has_pair = None if pairs is None else pairs.cpu() >= 0
    return _means(table, tied / (queries * size), at, has_pair, curves, without_relevant)


# A key holds a place in the order of the scores (32 bits, best lowest), the tie rank (30 bits) and the relevance (1 bit):
# once the keys of a query are sorted, they are its ranking.
_SCORE = 1 << 31
_LOW = _SCORE - 1


def _sorted_keys(scores: Tensor, relevant: Tensor, order: Tensor, tie_rank: Tensor) -> Tensor:
    """scores [b, g] float, relevant [b, g] bool -> [b, g] int64 keys >= 0, best first."""
    if scores.device.type == "cpu" and scores.dtype == torch.float32:
        return _pack_and_sort(scores, relevant, tie_rank)
    falling, place = (0.0 - scores[:, order]).sort(dim=1, stable=True)  # 0.0 - x, not -x: it also turns -0.0 into 0.0
    distinct = torch.zeros_like(place)
    distinct[:, 1:] = (falling[:, 1:] != falling[:, :-1]).cumsum(1)
    return distinct * _SCORE + place * 2 + relevant.gather(1, order[place])


def _pack_and_sort(scores: Tensor, relevant: Tensor, tie_rank: Tensor) -> Tensor:
    """The same for float32 on a CPU, several times faster: no argsort and no gather, only NumPy's vectorised sort.

    The threads are Python's, and all passes NumPy's, which lets go of the interpreter lock: they meet once per chunk,
    not in every pass, and do not wait behind the threads of torch, which spin for a while after each of its passes.
    """
    keys = np.empty(scores.shape, dtype=np.int64)
    low = tie_rank.numpy() * 2 + 2**62  # 2**62: the smallest 32-bit integer, times _SCORE, becomes 0

    def fill(part: slice) -> None:
        bits = (np.float32(0) - scores[part].numpy()).view(np.int32)
        bits ^= (bits >> 31) & 0x7FFFFFFF  # floats are sign and magnitude; now they compare as integers do
        np.multiply(bits, _SCORE, out=keys[part], dtype=np.int64)
        keys[part] += low
        keys[part] += relevant[part].numpy()
        keys[part].sort(axis=1)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, _parts(scores, CACHED_SCORES // 4)))
    return torch.from_numpy(keys)


def _parts(rows: Tensor, elements: int) -> Iterator[slice]:
    """Slices of the rows of [b, g] of about so many elements, on a CPU; else all of them at once."""
    height = max(1, elements // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), height):
        yield slice(start, start + height)


def _count_tied(keys: Tensor) -> int:
    """Sorted keys [b, g] -> the number of items whose score equals that of a neighbour."""
    same = (keys[:, 1:] ^ keys[:, :-1]) < _SCORE
    tied = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    tied[:, 1:] = same
    tied[:, :-1] |= same
    return int(tied.count_nonzero())


def _precision_sums(hit: Tensor, ap_variant: ApVariant) -> tuple[Tensor, Tensor]:
    """hit [b, g] int32, 1 where the item at a rank is relevant -> running sums over the ranks, [b, g] each.

    The number of hits (int32), and the sum of the precision at each hit (float64).
    """
    found = hit.cumsum(1, dtype=torch.int32)
    precision_at_hits = (found * hit).double().div_(_ranks(hit, 1 if ap_variant == "dlsl" else 0))
    # a running sum also for AP@all: torch may split the plain sum of one long row over threads, and chunks would show
    return found, precision_at_hits.cumsum_(1)


def _measure_hits(hit: Tensor, at: Sequence[int], curves: bool, ap_variant: ApVariant) -> dict[str, Tensor]:
    """hit [b, g] int32, by rank -> what depends on nothing else, [b] or [b, k] float64; 0 where nothing is relevant."""
    found, summed = _precision_sums(hit, ap_variant)
    measured = {"relevant": found[:, -1].double(), "ap": summed[:, -1] / found[:, -1].clamp(min=1)}
    if at:
        last = _last(at, hit.shape[1])
        within = found[:, last]
        measured["map"] = summed[:, last] / within.clamp(min=1)
        measured["precision"] = within / torch.tensor(last, device=hit.device).add(1).double()
        measured["hit"] = (within > 0).double()
    if curves:
        best_from_here = (found / _ranks(hit)).flip(1).cummax(1).values.flip(1)
        tenths = torch.arange(len(RECALL_LEVELS), device=hit.device)
        needed = (found[:, -1:] * tenths + 9) // 10  # hits that reach a recall of so many tenths, without rounding
        measured["curve"] = best_from_here.gather(1, torch.searchsorted(found, needed))
    return measured


def _ndcg(shared: Tensor, top: Tensor, at: Sequence[int]) -> Tensor:
    """shared [b, g] labels in common, top [b, k] gallery indices by rank -> [b, len(at)] float64, 0 without an ideal."""
    discount = _ranks(top, 1).log2()
    gain = shared.gather(1, top).double()
    ideal = shared.float().topk(top.shape[1]).values.double()
    last = _last(at, shared.shape[1])
    best = (ideal / discount).cumsum(1)[:, last]
    return (gain / discount).cumsum(1)[:, last] / best.where(best > 0, 1.0)


def _means(
    table: Mapping[str, Tensor],
    tied: float,
    at: Sequence[int],
    has_pair: Tensor | None,
    curves: bool,
    without_relevant: WithoutRelevant,
) -> Retrieval:
    """Per-query values, [q] or [q, k] float64 each, to means."""
    answerable = table["relevant"] > 0
    counted = answerable if without_relevant == "ignore" else torch.ones_like(answerable)

    def mean_at(name: str, over: Tensor | None = counted) -> dict[int, float]:
        if over is None or not at:
            return {}
        return dict(zip(at, (_mean(column[over]) for column in table[name].T), strict=True))

    return Retrieval(
        average_precision=table["ap"].where(counted, math.nan),
        map=_mean(table["ap"][counted]),
        map_at=mean_at("map"),
        precision_at=mean_at("precision"),
        hit_at=mean_at("hit"),
        ndcg_at=mean_at("ndcg"),
        recall_at=mean_at("recall", has_pair),
        precision_recall=tuple(_mean(column[counted]) for column in table["curve"].T) if curves else None,
        queries=int(counted.sum()),
        left_out=int((~counted).sum()),
        paired=0 if has_pair is None else int(has_pair.sum()),
        tied=tied,
    )


def _mean(values: Tensor) -> float:
    # fsum is exact: neither the order of the queries nor the number of threads shows
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan


def _ranks(by_rank: Tensor, offset: int = 0) -> Tensor:
    """1, 2, ... (plus an offset) for the columns of [b, g]; float64."""
    return torch.arange(1 + offset, by_rank.shape[1] + 1 + offset, dtype=torch.float64, device=by_rank.device)


def _last(at: Sequence[int], size: int) -> list[int]:
    """The column of the last item within each K."""
    return [min(k, size) - 1 for k in at]


def _label_forms(query_labels: Tensor, gallery_labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `_shared` compares: class numbers [q] and [g] if nobody has two labels, which is faster; else [q, C], [g, C]."""
    forms = []
    for labels, no_class in ((query_labels, -1), (gallery_labels, -2)):  # two without a label have none in common
        if not labels.shape[1] or labels.sum(1).max() > 1:
            return query_labels.float(), gallery_labels.float()
        forms.append(torch.where(labels.any(1), labels.int().argmax(1), no_class).int())
    return forms[0], forms[1]


def _shared(query_form: Tensor, gallery_form: Tensor) -> Tensor:
    """[b, g] the number of labels in common: float, or bool where it is at most one."""
    return query_form[:, None] == gallery_form if query_form.ndim == 1 else query_form @ gallery_form.T


def _check_labels(query_labels: Tensor, gallery_labels: Tensor) -> None:
    for name, labels in (("query_labels", query_labels), ("gallery_labels", gallery_labels)):
        if labels.ndim != 2 or labels.dtype != torch.bool:
            raise ValueError(f"{name}: expected [n, C] bool, got {list(labels.shape)} {labels.dtype}")
    if query_labels.shape[1] != gallery_labels.shape[1]:
        raise ValueError(
            f"labels: queries have {query_labels.shape[1]} classes but the gallery has {gallery_labels.shape[1]}"
        )


def _check_choices(at: Sequence[int], ap_variant: str, without_relevant: str, chunk: int | None) -> None:
    if wrong := [k for k in at if k < 1]:
        raise ValueError(f"at: expected every K to be at least 1, got {wrong[0]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1 query, got {chunk}")
    if ap_variant not in get_args(ApVariant):
        raise ValueError(f"ap_variant: expected one of {', '.join(get_args(ApVariant))}, got {ap_variant!r}")
    if without_relevant not in get_args(WithoutRelevant):
        raise ValueError(
            f"without_relevant: expected one of {', '.join(get_args(WithoutRelevant))}, got {without_relevant!r}"
        )


def _check_gallery(queries: int, size: int, order: Tensor, pairs: Tensor | None) -> None:
    if not queries or not size:
        raise ValueError(f"expected at least one query and one gallery item, got {queries} and {size}")
    everyone = torch.arange(size, device=order.device)
    if order.dtype != torch.int64 or order.shape != (size,) or not torch.equal(order.sort().values, everyone):
        raise ValueError(f"order: expected an int64 permutation of {size} gallery items, got {_short(order)}")
    if pairs is None:
        return
    if pairs.dtype != torch.int64 or pairs.shape != (queries,):
        raise ValueError(f"pairs: expected [{queries}] int64, got {_short(pairs)}")
    if pairs.min() < -1 or pairs.max() >= size:
        raise ValueError(f"pairs: expected -1 or an index below {size}, got {pairs.min()} to {pairs.max()}")


def _blocks(scores: Scores, queries: int, size: int, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """All scores, chunk by chunk: a slice of the queries and their [b, g] float32 or float64."""
    for start in range(0, queries, chunk):
        rows = slice(start, min(start + chunk, queries))
        yield rows, _checked(scores(rows).detach(), rows, size)


def _checked(block: Tensor, rows: slice, size: int) -> Tensor:
    """The scores of a chunk as float32 or float64, if that is what they are."""
    expected = (rows.stop - rows.start, size)
    if block.shape != expected or not block.is_floating_point():
        raise ValueError(f"scores: expected {list(expected)} floating point, got {_short(block)}")
    if block.amax().isnan():  # amax hands a NaN on
        bad = int(block.isnan().any(1).nonzero()[0]) + rows.start
        raise ValueError(f"scores: query {bad} has a NaN score; NaN has no rank")
    return block if block.dtype == torch.float64 else block.float()


def _short(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype}"
