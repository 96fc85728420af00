"""How well a ranking of the gallery answers the queries: mAP, Recall@K, nDCG@K and curves, in chunks, on the device.

One meaning for all of them. The whole gallery is ranked by score, higher first, and items with equal scores stand in
one seeded order of the gallery, the same for every method: the order in which the gallery is stored would reward a
collapsed model wherever the items are sorted by class. 0.0 and -0.0 are equal. An item is relevant if it shares a label
with the query. Queries with nothing relevant in the gallery are left out of the means, and counted.

Sources: average precision and interpolated precision as in Manning, Raghavan, Schuetze, "Introduction to Information
Retrieval" (2008), section 8.4; nDCG as in Jaervelin and Kekaelaeinen (TOIS 2002), with linear gain and log2(rank + 1).
Departs from the authors of the learners: the multi-label code of DSCMR and FedCMR cuts the ranking at the number of
queries, which is the gallery only where the two are equal; single-label code counts a query with nothing relevant as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor

Scores = Callable[[slice], Tensor]
"""Gives the scores [b, g] of the queries in a slice, floating point, against the whole gallery; higher is closer."""

ApVariant = Literal["standard", "dlsl"]
"""`dlsl` divides by rank + 1 as the DLSL authors' main.m does by mistake, so that a hit at rank 1 counts .5."""

WithoutRelevant = Literal["ignore", "zero"]
"""What a query with nothing relevant does to a mean: nothing, or enter it as 0."""

RECALL_LEVELS = tuple(tenth / 10 for tenth in range(11))
"""Where the precision-recall curve is read."""

CHUNK_SCORES = 1 << 22
"""About how many scores one call gives, 16 MB in float32: enough rows for an efficient matrix product."""

CACHED_SCORES = 1 << 17
"""About how many of them a CPU thread ranks at a time: the passes over 1 MB of keys stay in its cache."""


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
    recall_at: share of queries whose own pair is in the top K; over the `paired` queries that have one, whatever their
        labels; empty without pairs.
    precision_recall: interpolated precision at the RECALL_LEVELS; None unless asked for.
    queries: how many queries the means (but recall_at's) are over.
    left_out: how many queries with nothing relevant are in none of them; 0 where they enter as 0.
    gallery: how many items are ranked.
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
    gallery: int
    paired: int
    tied: float


def relevance(query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
    """[q, C] and [g, C] bool -> [q, g] bool: whether the two share at least one label."""
    _check_labels(query_labels, gallery_labels)
    return _shared(*_label_forms(query_labels, gallery_labels)).bool()


def tie_order(gallery_size: int, rng: Generator) -> Tensor:
    """[g] int64 permutation of the gallery: of two items with equal scores, the one that comes first ranks higher."""
    return torch.randperm(gallery_size, generator=rng, device=rng.device)


def ranking(scores: Tensor, order: Tensor) -> Tensor:
    """The definition of rank: scores [q, g], order [g] as from `tie_order` -> [q, g] gallery indices, best first."""
    return order[scores[:, order].argsort(dim=1, descending=True, stable=True)]


def average_precision(scores: Tensor, relevant: Tensor, order: Tensor, ap_variant: ApVariant = "standard") -> Tensor:
    """The definition of average precision: the mean, over the relevant items, of the precision at their ranks.

    scores [q, g]; relevant [q, g] bool; order [g] as from `tie_order`.
    Returns [q] float64, NaN for a query with nothing relevant. `retrieval` gives the same, in chunks and faster.
    """
    hit = relevant.gather(1, ranking(scores, order)).long()
    found, precision = _precision_at_hits(hit, _ranks(hit, 1 if ap_variant == "dlsl" else 0))
    return precision.sum(1) / found[:, -1]


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
    chunk: queries per call of `scores`; by default from the size of the gallery. From the same scores, any chunk gives
        the same bits on a CPU. (A matrix product may itself round differently for another number of rows.)

    Raises ValueError for an empty gallery or no queries, for shapes that do not fit, for a K below 1, for an order that
    is no permutation, and for scores that are not floating point or contain NaN. Infinite scores are ranked.
    """
    _check_labels(query_labels, gallery_labels)
    _check_choices(at, ap_variant, without_relevant, chunk)
    queries, size = len(query_labels), len(gallery_labels)
    _check_gallery(queries, size, order, pairs)
    query_form, gallery_form = _label_forms(query_labels, gallery_labels)
    ranks = torch.arange(1, size + 1, dtype=torch.float64) + (1 if ap_variant == "dlsl" else 0)
    last = [min(k, size) - 1 for k in at]  # the column of the last item within each K
    depth = size if curves else max(at, default=0)  # how much of a ranking must be kept

    tied = 0
    table: dict[str, Tensor] = {}  # per query: name -> [q] or [q, k] float64, CPU
    for rows, block in _blocks(scores, queries, size, chunk or max(1, CHUNK_SCORES // size)):
        order, ranks, gallery_form = (x.to(block.device) for x in (order, ranks, gallery_form))
        shared = _shared(query_form[rows].to(block.device), gallery_form)
        ranked = _rank(block, shared.bool(), order, ranks, [*last, size - 1], depth)
        tied += ranked.tied
        measured = _measure_hits(ranked, last)
        if at:
            top = order[ranked.top[:, : max(at)] >> 1]
            measured["ndcg"] = _ndcg(shared, top, last)
            if pairs is not None:
                own = top == pairs[rows, None].to(block.device)
                measured["recall"] = own.cumsum(1)[:, last].double()
        if curves:
            measured["curve"] = _interpolated_precision(ranked.top & 1)
        for name, value in measured.items():
            if name not in table:  # not a list of chunks: small pieces kept among large ones freed make the heap grow
                table[name] = torch.empty(queries, *value.shape[1:], dtype=torch.float64)
            table[name][rows] = value.cpu()
    has_pair = None if pairs is None else pairs.cpu() >= 0
    return _means(table, size, tied / (queries * size), at, has_pair, curves, without_relevant)


def scores_of(scores: Scores, wanted: Tensor, queries: int, size: int) -> Tensor:
    """The scores of some queries as `retrieval` sees them; wanted: [k] int64, on the CPU. Returns [k, g].

    From calls with the same slices: a matrix product may itself round differently for another number of rows.
    """
    chunk = max(1, CHUNK_SCORES // size)
    found: dict[int, Tensor] = {}
    for start in sorted({int(query) // chunk * chunk for query in wanted}):
        rows = slice(start, min(start + chunk, queries))
        block = _checked(scores(rows).detach(), rows, size)
        found |= {query: block[query - start].clone() for query in wanted.tolist() if start <= query < rows.stop}
    return torch.stack([found[query] for query in wanted.tolist()])


# A key holds a place in the order of the scores (32 bits, best lowest), the tie rank (30 bits) and the relevance (1):
# once the keys of a query are sorted, they are its ranking.
_SCORE = 1 << 31
_LOW = _SCORE - 1

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Array = TypeVar("Array", npt.NDArray[Any], Tensor)


@dataclass(frozen=True)
class _Ranked:
    """What is kept of the rankings of b queries.

    top: [b, depth] int64, tie rank * 2 + relevance of the best items.
    found: [b, k] int64, how many items up to each of k ranks are relevant.
    summed: [b, k] float64, the precision summed over these.
    tied: how many items share their score with another, over all b queries.
    """

    top: Tensor
    found: Tensor
    summed: Tensor
    tied: int


def _rank(scores: Tensor, relevant: Tensor, order: Tensor, ranks: Tensor, columns: list[int], depth: int) -> _Ranked:
    """scores [b, g] float32 or float64, relevant [b, g] bool, ranks [g] what the precision divides by.

    On a CPU all passes are NumPy's, in Python's threads, a few rows at a time. So the rows stay in the cache, the
    threads meet once per chunk and not in every pass, and they do not compete with those of torch, which spin on after
    each of its passes: on a busy machine that took up to five times as long.
    """
    if scores.device.type != "cpu":
        top, found, summed, tied = _read(_sorted_keys(scores, relevant, order), ranks, columns, depth)
        return _Ranked(top, found, torch.stack(summed, 1), tied)
    pack = scores.dtype == torch.float32
    rows = scores if pack else _sorted_keys(scores, relevant, order)
    low = torch.empty_like(order)
    low[order] = torch.arange(0, 2 * len(order), 2)

    def rank_part(part: slice) -> tuple[IntArray, IntArray, FloatArray, int]:
        keys = rows[part].numpy()
        if pack:
            keys = _packed_keys(keys, relevant[part].numpy(), low.numpy())
            keys.sort(axis=1)
        top, found, summed, tied = _read(keys, ranks.numpy(), columns, depth)
        return top, found, np.stack(summed, 1), tied

    height = max(1, CACHED_SCORES // len(order))
    parts = [slice(start, start + height) for start in range(0, len(scores), height)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        tops, founds, sums, ties = zip(*pool.map(rank_part, parts), strict=True)
    joined = [torch.from_numpy(np.concatenate(x)) for x in (tops, founds, sums)]
    return _Ranked(joined[0], joined[1], joined[2], sum(ties))


def _sorted_keys(scores: Tensor, relevant: Tensor, order: Tensor) -> Tensor:
    """scores [b, g] float, relevant [b, g] bool -> [b, g] int64 keys, best first: for any dtype and device."""
    falling, tie_rank = (0.0 - scores[:, order]).sort(dim=1, stable=True)  # not -x: 0.0 - x also turns -0.0 into 0.0
    place = torch.zeros_like(tie_rank)
    place[:, 1:] = (falling[:, 1:] != falling[:, :-1]).cumsum(1)
    return place * _SCORE + tie_rank * 2 + relevant.gather(1, order[tie_rank])


def _packed_keys(scores: npt.NDArray[np.float32], relevant: npt.NDArray[np.bool_], low: IntArray) -> IntArray:
    """The keys of float32 scores without ranking them first: sorting them takes no argsort and no gather.

    low [g]: tie rank * 2.
    """
    bits = (np.float32(0) - scores).view(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # floats are sign and magnitude; now they compare as integers do
    keys = np.multiply(bits, _SCORE, dtype=np.int64)
    keys += low + 2**62  # the lowest place becomes 0, so that no key is negative
    keys += relevant
    return keys


def _read(keys: Array, ranks: Array, columns: list[int], depth: int) -> tuple[Array, Array, list[Array], int]:
    """Sorted keys [b, g], of NumPy or torch -> the fields of `_Ranked`, with `summed` as its columns."""
    found, precision = _precision_at_hits(keys & 1, ranks)
    summed = [precision[:, : column + 1].sum(1) for column in columns]
    return keys[:, :depth] & _LOW, found[:, columns], summed, _count_tied(keys)


def _precision_at_hits(hit: Array, ranks: Array) -> tuple[Array, Array]:
    """hit [b, g] int64, 1 where the item at a rank is relevant -> [b, g] each, by rank.

    The number of hits so far (int64), and the precision (float64) where there is a hit, else 0.
    """
    found = hit.cumsum(1)
    precision = found / ranks
    precision *= hit
    return found, precision


def _count_tied(keys: Array) -> int:
    """Sorted keys [b, g] -> the number of items whose score equals that of a neighbour."""
    same = (keys[:, 1:] ^ keys[:, :-1]) < _SCORE
    inner = same[:, 1:] | same[:, :-1]
    return int(inner.sum() + same[:, :1].sum() + same[:, -1:].sum())


def _measure_hits(ranked: _Ranked, last: list[int]) -> dict[str, Tensor]:
    """What depends on relevance alone, [b] or [b, k] float64; 0 where nothing is relevant."""
    precision = ranked.summed / ranked.found.clamp(min=1)
    measured = {"relevant": ranked.found[:, -1].double(), "ap": precision[:, -1]}
    if last:
        within = ranked.found[:, :-1]
        measured["map"] = precision[:, :-1]
        measured["precision"] = within / (torch.tensor(last, dtype=torch.float64, device=within.device) + 1)
        measured["hit"] = (within > 0).double()
    return measured


def _interpolated_precision(hit: Tensor) -> Tensor:
    """hit [b, g] int64 by rank -> [b, 11] float64: the best precision of the ranks that reach each of RECALL_LEVELS."""
    found = hit.cumsum(1)
    best_from_here = (found / _ranks(hit)).flip(1).cummax(1).values.flip(1)
    tenths = torch.arange(len(RECALL_LEVELS), device=hit.device)
    needed = (found[:, -1:] * tenths + 9) // 10  # hits that make a recall of so many tenths, without rounding
    return best_from_here.gather(1, torch.searchsorted(found, needed))


def _ndcg(shared: Tensor, top: Tensor, last: list[int]) -> Tensor:
    """shared [b, g] labels in common, top [b, k] gallery items by rank -> [b, len(last)] float64; 0 for 0 / 0."""
    discount = _ranks(top, 1).log2()
    gain = shared.gather(1, top).double()
    ideal = shared.float().topk(top.shape[1]).values.double()
    best = (ideal / discount).cumsum(1)[:, last]
    return (gain / discount).cumsum(1)[:, last] / best.where(best > 0, 1.0)


def _means(
    table: Mapping[str, Tensor],
    gallery: int,
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
        gallery=gallery,
        paired=0 if has_pair is None else int(has_pair.sum()),
        tied=tied,
    )


def _mean(values: Tensor) -> float:
    # fsum is exact: neither the order of the queries nor the number of threads shows
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan


def _ranks(by_rank: Tensor, offset: int = 0) -> Tensor:
    """1, 2, ... (plus an offset) for the columns of [b, g]; float64."""
    return torch.arange(1 + offset, by_rank.shape[1] + 1 + offset, dtype=torch.float64, device=by_rank.device)


def _label_forms(query_labels: Tensor, gallery_labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `_shared` compares: class numbers [q], [g] if nobody has two labels (faster), else [q, C], [g, C] float."""
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
