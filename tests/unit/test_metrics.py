"""What every metric promises, whatever the numbers. The numbers themselves: reference/test_metrics_reference.py."""

import math
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedxmr.metrics import Retrieval, average_precision, mean_average_precision, relevance, retrieval, tie_order


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_hot(classes: list[int], num_classes: int = 3) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).bool()


def measure(scores: Tensor, query_labels: Tensor, gallery_labels: Tensor, **options: object) -> Retrieval:
    """Everything there is to measure, ties in the order of the gallery unless said otherwise."""
    order = options.pop("order", torch.arange(len(gallery_labels)))
    options = {"at": (1, 2, 3, 100), "curves": True} | options
    return retrieval(lambda rows: scores[rows], query_labels, gallery_labels, order=order, **options)


def same(a: Retrieval, b: Retrieval) -> bool:
    """Bit for bit, where NaN equals NaN."""
    return all(repr(vars(a)[f.name]) == repr(vars(b)[f.name]) for f in fields(a) if f.name != "average_precision") and (
        torch.equal(a.average_precision.nan_to_num(-1), b.average_precision.nan_to_num(-1))
    )


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Tensor]:
    """Small random problems: few distinct scores, so ties are common; labels may be single, several or none."""
    queries, size, classes = draw(st.integers(1, 5)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    generator = rng(draw(st.integers(0, 2**32)))
    several = draw(st.booleans())

    def labels(n: int) -> Tensor:
        if several:
            return torch.rand(n, classes, generator=generator) < 0.4
        return one_hot(torch.randint(classes, (n,), generator=generator).tolist(), classes)

    return {
        "scores": torch.randint(-4, 5, (queries, size), generator=generator).to(draw(st.sampled_from(FLOATS))) / 4,
        "query_labels": labels(queries),
        "gallery_labels": labels(size),
        "order": tie_order(size, generator),
        "pairs": torch.randint(-1, size, (queries,), generator=generator),
    }


FLOATS = [torch.float32, torch.float64]


# Ties


def test_a_collapsed_model_scores_at_chance_on_a_gallery_sorted_by_class():
    # the order of the gallery as tie-breaker gives .210 here: more than some trained models reach
    labels = one_hot([c for c in range(10) for _ in range(50)], 10)
    collapsed = torch.full((500, 500), 0.3)
    seen = [measure(collapsed, labels, labels, order=tie_order(500, rng(seed))) for seed in range(8)]
    assert math.fsum(r.map for r in seen) / 8 == pytest.approx(0.114, abs=0.01)
    assert all(r.tied == 1 for r in seen)
    assert measure(collapsed, labels, labels).map == pytest.approx(0.210, abs=0.001)


def test_all_zero_embeddings_are_one_big_tie():
    labels = one_hot([0, 1, 2, 0])
    found = measure(torch.zeros(4, 8) @ torch.zeros(8, 4), labels, labels)
    assert found.tied == 1
    assert 0 < found.map < 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_zero_and_minus_zero_tie(dtype: torch.dtype, zeros: tuple[float, float]):
    scores = torch.tensor([zeros], dtype=dtype)
    for order, expected in (([0, 1], 1.0), ([1, 0], 0.5)):
        found = measure(scores, one_hot([0]), one_hot([0, 1]), order=torch.tensor(order))
        assert (found.map, found.tied) == (expected, 1.0)


def test_the_share_of_ties_counts_the_items_whose_score_is_not_unique():
    scores = torch.tensor([[1.0, 1.0, 2.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    labels = one_hot([0] * 6)
    assert measure(scores, labels[:2], labels).tied == pytest.approx((5 / 6 + 0) / 2)
    assert measure(scores.double(), labels[:2], labels).tied == pytest.approx((5 / 6 + 0) / 2)


def test_float64_scores_that_float32_cannot_tell_apart_are_told_apart():
    scores = torch.tensor([[1.0, 1.0 + 1e-15]], dtype=torch.float64)
    found = measure(scores, one_hot([1]), one_hot([0, 1]))
    assert (found.map, found.tied) == (1.0, 0.0)
    assert measure(scores.float(), one_hot([1]), one_hot([0, 1])).map == 0.5


def test_float32_scores_one_bit_apart_are_told_apart_on_both_sides_of_zero():
    tiny = torch.finfo(torch.float32).smallest_normal / 2**23  # the smallest subnormal
    rising = torch.tensor([-math.inf, -1 - 2**-23, -1, -tiny, 0, tiny, 1 - 2**-24, 1, 1 + 2**-23, math.inf])
    labels = torch.eye(len(rising), dtype=torch.bool)
    found = measure(rising.expand(len(rising), -1), labels, labels)
    assert found.tied == 0
    assert found.average_precision.tolist() == [1 / rank for rank in range(len(rising), 0, -1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_rank_as_the_same_numbers_in_float32(dtype: torch.dtype):
    scores = torch.randn(5, 40, generator=rng()).to(dtype)
    labels = torch.rand(40, 3, generator=rng(1)) < 0.4
    assert same(measure(scores, labels[:5], labels), measure(scores.float(), labels[:5], labels))


def test_the_tie_order_is_a_permutation_drawn_from_the_generator_alone():
    assert torch.equal(tie_order(50, rng(1)), tie_order(50, rng(1)))
    assert not torch.equal(tie_order(50, rng(1)), tie_order(50, rng(2)))
    assert tie_order(50, rng(1)).sort().values.tolist() == list(range(50))


# Properties


@settings(deadline=None)
@given(problems())
def test_a_strictly_increasing_map_of_the_scores_changes_nothing(problem: dict[str, Tensor]):
    scores = problem.pop("scores")
    assert same(measure(scores, **problem), measure(scores**3 * 8 + scores - 5, **problem))


@settings(deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_storing_the_gallery_in_another_order_changes_nothing(problem: dict[str, Tensor], seed: int):
    moved = tie_order(len(problem["gallery_labels"]), rng(seed))
    position = moved.argsort()
    again = {
        "scores": problem["scores"][:, moved],
        "query_labels": problem["query_labels"],
        "gallery_labels": problem["gallery_labels"][moved],
        "order": position[problem["order"]],
        "pairs": torch.where(problem["pairs"] < 0, -1, position[problem["pairs"].clamp(min=0)]),
    }
    assert same(measure(**problem), measure(**again))


@settings(deadline=None)
@given(problems(), st.integers(1, 6))
def test_the_chunk_does_not_show(problem: dict[str, Tensor], chunk: int):
    assert same(measure(**problem), measure(**problem, chunk=chunk))


def test_the_chunk_does_not_show_in_a_long_row():
    # libraries split long sums over threads, by the shape of what they are given
    scores = torch.randn(3, 70_001, generator=rng())
    labels = torch.rand(70_001, 4, generator=rng()) < 0.2
    one, two, three = (measure(scores, labels[:3], labels, chunk=chunk) for chunk in (1, 2, 3))
    assert same(one, two)
    assert same(two, three)


def test_the_number_of_threads_does_not_show(monkeypatch: pytest.MonkeyPatch):
    scores = torch.randn(200, 900, generator=rng())
    labels = torch.rand(900, 5, generator=rng()) < 0.3
    monkeypatch.setattr("fedxmr.metrics.CACHED_SCORES", 7 * 900)
    found = []
    for threads in (1, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(measure(scores, labels[:200], labels))
    assert same(*found)


@settings(deadline=None)
@given(problems(), st.sampled_from(["standard", "dlsl"]))
def test_every_mean_is_between_0_and_1(problem: dict[str, Tensor], ap_variant: str):
    found = measure(**problem, ap_variant=ap_variant, without_relevant="zero")
    means = [found.map, found.tied, *found.precision_recall]
    for by_k in (found.map_at, found.precision_at, found.hit_at, found.ndcg_at):
        means += by_k.values()
    assert all(-1e-12 <= x <= 1 + 1e-12 for x in means)


@settings(deadline=None)
@given(problems(), st.sampled_from(["standard", "dlsl"]))
def test_the_fast_path_is_the_definition(problem: dict[str, Tensor], ap_variant: str):
    relevant = relevance(problem["query_labels"], problem["gallery_labels"])
    defined = average_precision(problem["scores"], relevant, problem["order"], ap_variant)
    found = measure(**problem, ap_variant=ap_variant)
    torch.testing.assert_close(found.average_precision, defined, rtol=1e-14, atol=0, equal_nan=True)


@settings(deadline=None)
@given(problems())
def test_float32_and_float64_take_different_ways_to_the_same_ranking(problem: dict[str, Tensor]):
    scores = problem.pop("scores")
    assert same(measure(scores.float(), **problem), measure(scores.double(), **problem))


def test_a_perfect_ranking_is_1_by_every_metric():
    labels = torch.rand(60, 5, generator=rng()) < 0.4
    shared = labels.float() @ labels.float().T
    found = measure(shared, labels, labels, at=(1, 5, 60))
    assert found.map == 1
    assert set(found.precision_recall) == {1.0}
    assert found.map_at == found.hit_at == found.ndcg_at == {1: 1.0, 5: 1.0, 60: 1.0}


# Who counts


def test_a_query_with_nothing_relevant_is_left_out_and_counted():
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    found = measure(scores, one_hot([1, 2]), one_hot([0, 1]))
    assert (found.map, found.queries, found.left_out) == (0.5, 1, 1)
    assert found.average_precision.isnan().tolist() == [False, True]


def test_a_query_with_nothing_relevant_is_0_where_that_is_asked_for():
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    found = measure(scores, one_hot([1, 2]), one_hot([0, 1]), without_relevant="zero")
    assert (found.map, found.queries, found.left_out) == (0.25, 2, 0)
    assert found.average_precision.tolist() == [0.5, 0.0]
    assert found.ndcg_at[2] == pytest.approx(0.5 / math.log2(3))
    assert found.precision_recall == (0.25,) * 11


def test_a_mean_over_no_query_is_nan():
    found = measure(torch.ones(1, 2), one_hot([2]), one_hot([0, 1]), pairs=torch.tensor([-1]))
    assert (found.queries, found.left_out, found.paired) == (0, 1, 0)
    assert math.isnan(found.map)
    assert math.isnan(found.recall_at[1])


def test_items_without_a_label_are_relevant_to_nobody():
    nobody = torch.zeros(2, 3, dtype=torch.bool)
    assert not relevance(nobody, nobody).any()
    assert not relevance(nobody, torch.ones(2, 3, dtype=torch.bool)).any()
    assert not relevance(nobody[:, :0], nobody[:, :0]).any()


def test_one_shared_label_is_enough_to_be_relevant():
    query = torch.tensor([[True, True, False]])
    gallery = torch.tensor([[False, True, True], [False, False, True]])
    assert relevance(query, gallery).tolist() == [[True, False]]


def test_recall_counts_a_pair_whatever_its_labels_and_leaves_out_queries_without_one():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    found = measure(scores, one_hot([2, 2, 2]), one_hot([0, 1, 0]), pairs=torch.tensor([1, -1, 2]))
    assert (found.left_out, found.paired) == (3, 2)
    assert found.recall_at == {1: 0.0, 2: 0.5, 3: 1.0, 100: 1.0}


def test_without_pairs_or_ks_or_curves_nothing_of_the_kind_is_reported():
    found = measure(torch.ones(1, 2), one_hot([0]), one_hot([0, 1]), at=(), curves=False)
    assert found.map_at == found.precision_at == found.hit_at == found.ndcg_at == found.recall_at == {}
    assert found.precision_recall is None


# Scores come in chunks


def test_scores_are_asked_for_once_each_and_in_order():
    labels = one_hot([0, 1, 2, 0, 1])
    asked = []

    def scores(rows: slice) -> Tensor:
        asked.append((rows.start, rows.stop))
        return torch.zeros(rows.stop - rows.start, 5)

    retrieval(scores, labels, labels, order=torch.arange(5), chunk=2)
    assert asked == [(0, 2), (2, 4), (4, 5)]


def test_the_scores_of_the_caller_stay_as_they_were():
    labels = one_hot([0, 1, 2, 0])
    for dtype in FLOATS:
        scores = torch.randn(4, 4, generator=rng(), dtype=dtype)
        before = scores.clone()
        measure(scores, labels, labels)
        assert torch.equal(scores, before)


def test_scores_may_be_strided_and_carry_a_gradient():
    scores = torch.randn(6, 4, generator=rng(), requires_grad=True)
    labels = one_hot([0, 1, 2, 0, 1, 2])
    assert same(measure(scores.T, labels[:4], labels), measure(scores.detach().T.contiguous(), labels[:4], labels))


def test_the_lean_call_gives_the_same_mean():
    labels = torch.rand(30, 4, generator=rng()) < 0.3
    scores, order = torch.randn(30, 30, generator=rng()), tie_order(30, rng())
    lean = mean_average_precision(lambda rows: scores[rows], labels, labels, order=order)
    assert lean == measure(scores, labels, labels, order=order).map


# Mistakes

SIX = one_hot([0, 1, 2, 0, 1, 2])
MISTAKES = [
    ({"query_labels": SIX.float()}, r"query_labels: expected \[n, C\] bool, got \[6, 3\] torch.float32"),
    ({"gallery_labels": SIX[0]}, r"gallery_labels: expected \[n, C\] bool, got \[3\] torch.bool"),
    ({"gallery_labels": SIX[:, :2]}, "labels: queries have 3 classes but the gallery has 2"),
    ({"query_labels": SIX[:0]}, "expected at least one query and one gallery item, got 0 and 6"),
    ({"gallery_labels": SIX[:0]}, "expected at least one query and one gallery item, got 6 and 0"),
    ({"at": (5, 0)}, "at: expected every K to be at least 1, got 0"),
    ({"at": (-3,)}, "at: expected every K to be at least 1, got -3"),
    ({"chunk": 0}, "chunk: expected at least 1 query, got 0"),
    ({"ap_variant": "best"}, "ap_variant: expected one of standard, dlsl, got 'best'"),
    ({"without_relevant": "one"}, "without_relevant: expected one of ignore, zero, got 'one'"),
    ({"order": torch.zeros(6, dtype=torch.int64)}, "order: expected an int64 permutation of 6 gallery items"),
    ({"order": torch.arange(5)}, r"order: expected an int64 permutation of 6 gallery items, got \[5\] torch.int64"),
    ({"order": torch.arange(6).int()}, "order: expected an int64 permutation of 6 gallery items"),
    ({"pairs": torch.arange(5)}, r"pairs: expected \[6\] int64, got \[5\] torch.int64"),
    ({"pairs": torch.ones(6)}, r"pairs: expected \[6\] int64, got \[6\] torch.float32"),
    ({"pairs": torch.arange(6) + 1}, "pairs: expected -1 or an index below 6, got 1 to 6"),
    ({"pairs": torch.arange(6) - 2}, "pairs: expected -1 or an index below 6, got -2 to 3"),
    ({"scores": torch.zeros(6, 5)}, r"scores: expected \[6, 6\] floating point, got \[6, 5\] torch.float32"),
    ({"scores": torch.zeros(6, 6).int()}, r"scores: expected \[6, 6\] floating point, got \[6, 6\] torch.int32"),
]


@pytest.mark.parametrize(("wrong", "message"), MISTAKES)
def test_a_mistake_is_named(wrong: dict[str, object], message: str):
    good = {"scores": torch.zeros(6, 6), "query_labels": SIX, "gallery_labels": SIX}
    with pytest.raises(ValueError, match=message):
        measure(**(good | wrong))


@pytest.mark.parametrize("dtype", [torch.float16, *FLOATS])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_nan_score_is_refused_by_query(dtype: torch.dtype, sign: int):
    scores = torch.zeros(6, 6, dtype=dtype)
    scores[4, 2] = math.copysign(math.nan, sign)
    scores[5] = math.inf
    for chunk in (1, 3, None):
        with pytest.raises(ValueError, match="scores: query 4 has a NaN score"):
            measure(scores, SIX, SIX, chunk=chunk)


# Size

LARGE = """
import resource, torch
from fedxmr.metrics import retrieval, tie_order
n, rng = 30_000, torch.Generator().manual_seed(0)
image, text = (torch.randn(n, 256, generator=rng) for _ in range(2))
{labels}
everything = dict(at=(50,), pairs=torch.arange(n), curves=True)
found = retrieval(lambda rows: image[rows] @ text.T, labels, labels, order=tie_order(n, rng), **everything)
print(found.map, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("labels", "chance"),
    [
        ("labels = torch.nn.functional.one_hot(torch.randint(80, (n,), generator=rng), 80).bool()", 1 / 80),
        ("labels = torch.rand(n, 80, generator=rng) < 0.05", 1 - 0.9975**80),
    ],
    ids=["single-label", "multi-label"],
)
def test_30_000_queries_against_30_000_items_fit_in_2_gb(labels: str, chance: float):
    run = subprocess.run(
        [sys.executable, "-c", LARGE.format(labels=labels)], capture_output=True, text=True, check=True
    )
    found, peak = map(float, run.stdout.split())
    assert found == pytest.approx(chance, rel=0.1)
    assert peak < 2e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, *FLOATS])
def test_a_gpu_ranks_as_a_cpu_does(dtype: torch.dtype):
    scores = (torch.randn(300, 400, generator=rng()) * 8).round().to(dtype) / 8  # ties, and zeros of both signs
    labels = torch.rand(400, 4, generator=rng()) < 0.3
    options = {"order": tie_order(400, rng()), "pairs": torch.arange(300), "chunk": 77}
    cpu, gpu = (measure(s, labels[:300], labels, **options) for s in (scores, scores.cuda()))
    torch.testing.assert_close(gpu.average_precision, cpu.average_precision, rtol=1e-14, atol=0, equal_nan=True)
    assert gpu.recall_at == cpu.recall_at
    assert gpu.ndcg_at == pytest.approx(cpu.ndcg_at)
    assert gpu.precision_recall == pytest.approx(cpu.precision_recall)
    assert gpu.tied == cpu.tied
