"""Partitioners: who gets which items, under every scheme."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedxmr.errors import InputError
from fedxmr.partition import Part, PartitionConfig, load_partition, partition, save_partition
from fedxmr.types import Items

SCHEMES = ["iid", "dirichlet", "shards", "quantity", "missing-modality", "unpaired"]


def make(n: int, classes: int = 5, labels_per_item: int = 1, seed: int = 0) -> Items:
    """Paired items whose features say which item they are."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((n, classes), dtype=bool)
    for _ in range(labels_per_item):
        labels[np.arange(n), rng.integers(classes, size=n)] = True
    number = torch.arange(n, dtype=torch.float32)[:, None]
    return Items.paired({"image": number * torch.ones(1, 3), "text": -number}, torch.tensor(labels))


def sparse(n: int, seed: int = 0) -> Items:
    """Items of which some lack the image, some the text, and some both."""
    rng = np.random.default_rng(seed)
    rows = {m: torch.tensor(np.flatnonzero(rng.random(n) < 0.6)) for m in ("image", "text")}
    return Items({m: r[:, None].float() for m, r in rows.items()}, rows, make(n).labels)


def sizes(parts: list[Part]) -> list[int]:
    return [len(part.items) for part in parts]


def class_counts(train: Items, parts: list[Part]) -> Tensor:
    return torch.stack([train.labels[part.items].sum(0) for part in parts])


def check_division(train: Items, clients: int, parts: list[Part], min_items: int = 1) -> None:
    """Disjoint, each client with enough, ascending, every item with something held, held items owned."""
    assert len(parts) == clients
    assert min(sizes(parts)) >= min_items
    owned = torch.cat([part.items for part in parts])
    assert len(owned.unique()) == len(owned)
    for part in parts:
        assert part.items.dtype == torch.int64
        assert set(part.held) == set(train.features)
        for modality, held in part.held.items():
            assert (held.diff() > 0).all()
            assert set(held.tolist()) <= set(part.items.tolist()) & set(train.rows[modality].tolist())
        assert (part.items.diff() > 0).all()
        assert set(part.items.tolist()) == set().union(*(held.tolist() for held in part.held.values()))


def same(one: list[Part], other: list[Part]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.items, b.items)
        and a.held.keys() == b.held.keys()
        and all(torch.equal(a.held[m], b.held[m]) for m in a.held)
        for a, b in zip(one, other, strict=True)
    )


@settings(max_examples=200, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    n=st.integers(1, 80),
    clients=st.integers(1, 12),
    labels_per_item=st.integers(0, 3),
    complete=st.booleans(),
    alpha=st.sampled_from([1e-4, 0.05, 0.5, 1e6]),
    k=st.integers(1, 5),
    missing=st.floats(0, 1),
    unpaired=st.floats(0, 1),
    min_items=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_every_division_is_sound_repeatable_or_refused(
    scheme, n, clients, labels_per_item, complete, alpha, k, missing, unpaired, min_items, seed
):
    train = make(n, labels_per_item=labels_per_item, seed=seed) if complete else sparse(n, seed)
    options = {"alpha": alpha, "classes_per_client": k, "missing": missing, "unpaired": unpaired}
    config = PartitionConfig(scheme=scheme, min_items=min_items, **options)
    try:
        parts = partition(train, clients, config, seed)
    except InputError as error:
        assert "\n" not in str(error)
        return
    check_division(train, clients, parts, min_items)
    assert same(parts, partition(train, clients, config, seed))
    if scheme != "missing-modality":  # only there do items fall out, when their owner lacks all they have
        having = torch.cat(list(train.rows.values())).unique()
        assert torch.cat([part.items for part in parts]).sort().values.tolist() == having.tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_divides_differently(scheme: str):
    config = PartitionConfig(scheme=scheme)
    assert not same(partition(make(100), 4, config, 0), partition(make(100), 4, config, 1))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 200), data=st.data())
def test_iid_sizes_differ_by_at_most_one(n: int, data: st.DataObject):
    clients = data.draw(st.integers(1, n))
    numbers = sizes(partition(make(n), clients, PartitionConfig(), 0))
    assert max(numbers) - min(numbers) <= 1


def test_iid_mixes_items_whatever_their_order():
    train = make(1000)
    by_class = train.select(train.labels.int().argmax(1).argsort())
    counts = class_counts(by_class, partition(by_class, 4, PartitionConfig(), 0))
    assert (counts > 0.5 * counts.sum(0) / 4).all()


def test_dirichlet_goes_from_one_class_one_client_to_even_shares():
    train = make(3000)
    skewed = class_counts(train, partition(train, 3, PartitionConfig(scheme="dirichlet", alpha=1e-4), 0))
    even = class_counts(train, partition(train, 3, PartitionConfig(scheme="dirichlet", alpha=1e6), 0))
    total = train.labels.sum(0)
    assert (skewed.max(0).values == total).all()
    assert ((even - total / 3).abs() <= 0.02 * total).all()


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    # a share of Dirichlet(a, ..., a) over K clients has mean 1/K and variance (1/K)(1 - 1/K)/(K a + 1)
    train, k, alpha = make(2000, classes=100), 4, 0.5
    counts = class_counts(train, partition(train, k, PartitionConfig(scheme="dirichlet", alpha=alpha), 3))
    shares = counts / train.labels.sum(0)
    expected = (1 / k) * (1 - 1 / k) / (k * alpha + 1)
    assert float(shares.var(unbiased=False)) == pytest.approx(expected, rel=0.25)  # 400 shares


def test_dirichlet_on_several_labels_draws_one_of_them_evenly():
    # every item has both classes: at this alpha each class is one client's, so about half the items are each one's
    train = Items.paired({"a": torch.zeros(1000, 1)}, torch.ones(1000, 2, dtype=torch.bool))
    config = PartitionConfig(scheme="dirichlet", alpha=1e-4)
    assert all(400 < size < 600 for size in sizes(partition(train, 2, config, 0)))


@pytest.mark.parametrize(("clients", "k"), [(5, 1), (3, 2), (10, 3), (4, 5), (40, 2)])
def test_shards_give_every_client_exactly_k_classes(clients: int, k: int):
    train = make(600)
    parts = partition(train, clients, PartitionConfig(scheme="shards", classes_per_client=k), 0)
    assert ((class_counts(train, parts) > 0).sum(1) == k).all()
    assert sum(sizes(parts)) == 600


def test_shards_cut_large_classes_into_more_pieces():
    labels = torch.nn.functional.one_hot(torch.tensor([0] * 90 + [1] * 10), 2).bool()
    train = Items.paired({"a": torch.zeros(100, 1)}, labels)
    parts = partition(train, 10, PartitionConfig(scheme="shards", classes_per_client=1), 0)
    assert sizes(parts) == [10] * 10


def test_quantity_skews_sizes_and_leaves_nobody_short():
    train = make(1000)
    config = PartitionConfig(scheme="quantity", alpha=0.2, min_items=7)
    numbers = sizes(partition(train, 20, config, 0))
    assert sum(numbers) == 1000
    assert min(numbers) >= 7
    assert max(numbers) > 4 * 1000 / 20
    even = sizes(partition(train, 20, PartitionConfig(scheme="quantity", alpha=1e6), 0))
    assert max(even) - min(even) <= 3


def test_missing_modality_takes_turns_in_what_clients_lack():
    train = make(100)
    parts = partition(train, 10, PartitionConfig(scheme="missing-modality", missing=0.5), 0)
    lacking = {m: sum(not len(part.held[m]) for part in parts) for m in ("image", "text")}
    assert lacking == {"image": 3, "text": 2}
    assert sizes(parts) == [10] * 10
    assert all(len(held) in (0, 10) for part in parts for held in part.held.values())


def test_missing_modality_at_its_extremes():
    train = make(40)
    nobody = partition(train, 4, PartitionConfig(scheme="missing-modality", missing=0), 0)
    everybody = partition(train, 4, PartitionConfig(scheme="missing-modality", missing=1), 0)
    assert all(len(part.held[m]) == 10 for part in nobody for m in part.held)
    assert all(sorted(len(held) for held in part.held.values()) == [0, 10] for part in everybody)


@pytest.mark.parametrize(
    ("n", "clients", "config", "expected"),
    [
        (60, 100, {}, "clients: expected 1 to 60, as there are 60 training items and each client needs 1, got 100"),
        (60, 7, {"min_items": 10}, "clients: expected 1 to 6, as there are 60 training items and each client needs 10"),
        (60, 0, {}, "clients: expected 1 to 60"),
        (60, 50, {"scheme": "dirichlet", "alpha": 0.001}, "partition dirichlet: expected 1 items or more for each of "
         "50 clients, got 0 for client "),
        (60, 3, {"scheme": "shards", "classes_per_client": 6}, "classes_per_client: expected at most the 5 classes "
         "there are, got 6"),
        (60, 2, {"scheme": "shards"}, "partition shards: expected 5 shards or more, one per class, got 2 clients x 2 "
         "classes_per_client; raise classes_per_client to 3 or more"),
        (60, 50, {"scheme": "shards"}, "partition shards: expected items for 50 clients x 2 classes_per_client, got "
         "enough for 60 such shards of one item or more; lower clients or classes_per_client"),
        (60, 1, {"scheme": "missing-modality", "missing": 1}, "partition missing-modality: expected a client that "
         "keeps image, got none of 1 at missing=1.0; lower missing or raise clients"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_gets_one_line(n: int, clients: int, config: dict[str, object], expected: str):
    with pytest.raises(InputError, match="^" + re.escape(expected)) as caught:
        partition(make(n), clients, PartitionConfig(**config), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["missing-modality", "unpaired"])
def test_what_takes_modalities_away_needs_two(scheme: str):
    train = Items.paired({"image": torch.zeros(9, 2)}, make(9).labels)
    with pytest.raises(InputError, match=rf"partition {scheme}: expected two modalities or more, got \['image'\]"):
        partition(train, 3, PartitionConfig(scheme=scheme), 0)


def three_modalities(n: int) -> Items:
    return Items.paired({m: torch.arange(n)[:, None].float() for m in ("audio", "image", "text")}, make(n).labels)


def held_by_item(part: Part) -> list[int]:
    """In how many modalities the client has each of its items."""
    return [sum(int(item in held) for held in part.held.values()) for item in part.items]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(30, 90), clients=st.integers(1, 12), seed=st.integers(0, 2**40), complete=st.booleans())
def test_no_pair_is_left_where_all_items_are_unpaired(n: int, clients: int, seed: int, complete: bool):
    train = three_modalities(n) if complete else sparse(n, seed)
    parts = partition(train, clients, PartitionConfig(scheme="unpaired"), seed)
    check_division(train, clients, parts)
    assert all(set(held_by_item(part)) == {1} for part in parts)
    if complete:
        for part in parts:
            numbers = [len(held) for held in part.held.values()]
            assert max(numbers) - min(numbers) <= 1
        everyone = [sum(len(part.held[m]) for part in parts) for m in train.features]
        assert max(everyone) - min(everyone) <= 1


@pytest.mark.parametrize(("share", "single"), [(0.0, 0), (0.25, 5), (0.5, 10), (1.0, 20)])
def test_a_share_of_each_clients_items_is_unpaired(share: float, single: int):
    parts = partition(make(80), 4, PartitionConfig(scheme="unpaired", unpaired=share), 0)
    assert sizes(parts) == [20] * 4
    for part in parts:
        assert sorted(held_by_item(part)) == [1] * single + [2] * (20 - single)


def test_unpaired_clients_of_one_item_do_not_all_have_the_same_modality():
    parts = partition(make(40), 40, PartitionConfig(scheme="unpaired"), 0)
    assert sum(len(part.held["image"]) for part in parts) == sum(len(part.held["text"]) for part in parts) == 20


def test_which_modality_an_item_keeps_says_nothing_of_its_class_or_number():
    train = make(1200)
    parts = partition(train, 2, PartitionConfig(scheme="unpaired"), 0)
    seen = torch.cat([part.held["image"] for part in parts])
    counts = train.labels[seen].sum(0) / train.labels.sum(0)
    assert ((counts - 0.5).abs() < 0.12).all()  # four standard deviations of a share of about 240
    assert 0.4 < float((seen < 600).float().mean()) < 0.6


def test_take_gives_a_client_its_own_items_and_labels():
    train = make(50, labels_per_item=2)
    for part in partition(train, 4, PartitionConfig(), 0):
        taken = part.take(train)
        assert taken.features["image"][:, 2].tolist() == part.items.tolist()
        assert taken.features["text"][:, 0].tolist() == [-i for i in part.items.tolist()]
        assert torch.equal(taken.labels, train.labels[part.items])
        assert taken.rows["image"].tolist() == list(range(len(part.items)))


@pytest.mark.parametrize("scheme", ["iid", "missing-modality", "unpaired"])
def test_take_keeps_features_with_their_items_where_some_lack_a_modality(scheme: str):
    train = sparse(80)
    for part in partition(train, 4, PartitionConfig(scheme=scheme, missing=0.5), 0):
        taken = part.take(train)
        for modality, held in part.held.items():
            assert taken.features[modality][:, 0].tolist() == held.tolist()
            assert part.items[taken.rows[modality]].tolist() == held.tolist()


def test_take_copies():
    train = make(10)
    (part,) = partition(train, 1, PartitionConfig(), 0)
    part.take(train).features["image"].zero_()
    assert train.features["image"].sum() > 0


def test_take_refuses_other_training_items():
    parts = partition(make(50), 2, PartitionConfig(), 0)
    with pytest.raises(InputError, match="partition: expected items below 40, got 4"):
        for part in parts:
            part.take(make(40))
    with pytest.raises(InputError, match="partition: expected training items that have image, got some without it"):
        parts[0].take(sparse(50))


def test_parts_of_complete_data_spend_no_memory_on_what_is_held():
    parts = partition(make(100), 5, PartitionConfig(), 0)
    storage = parts[0].items.untyped_storage().data_ptr()
    for part in parts:
        assert part.items.untyped_storage().data_ptr() == storage
        assert all(held is part.items for held in part.held.values())


def test_ten_thousand_clients_share_a_hundred_thousand_items():
    parts = partition(make(100_000), 10_000, PartitionConfig(scheme="shards"), 0)
    assert len(parts) == 10_000
    assert min(sizes(parts)) >= 9


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("train", [make(60), sparse(60)], ids=["complete", "sparse"])
def test_a_saved_partition_comes_back_the_same(scheme: str, train: Items, tmp_path: Path):
    parts = partition(train, 4, PartitionConfig(scheme=scheme, alpha=5), 0)
    save_partition(tmp_path / "partition.npz", parts)
    assert same(parts, load_partition(tmp_path / "partition.npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["partition.npz"]


def test_the_same_partition_is_saved_as_the_same_bytes(tmp_path: Path):
    for name in ("one", "other"):
        save_partition(tmp_path / name, partition(make(30), 3, PartitionConfig(), 0))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


GOOD = {
    "items": np.array([1, 4, 0, 2]),
    "offsets": np.array([0, 2, 2, 4]),
    "held/image": np.array([True, False, True, True]),
    "held/text": np.array([True, True, True, True]),
}


def test_the_saved_layout_is_flat(tmp_path: Path):
    np.savez(tmp_path / "partition.npz", **GOOD)
    parts = load_partition(tmp_path / "partition.npz")
    assert [part.items.tolist() for part in parts] == [[1, 4], [], [0, 2]]
    assert [part.held["image"].tolist() for part in parts] == [[1], [], [0, 2]]
    assert [part.held["text"].tolist() for part in parts] == [[1, 4], [], [0, 2]]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"items": np.array([4, 1, 0, 2])}, "expected ascending items for each client"),
        ({"items": np.array([1, 1, 0, 2])}, "expected ascending items for each client"),
        ({"items": np.array([-1, 4, 0, 2])}, "expected ascending items for each client"),
        ({"offsets": np.array([0, 3, 2, 4])}, "expected ascending items for each client"),
        ({"offsets": np.array([0, 2, 3])}, "that fit each other"),
        ({"offsets": np.zeros(0, dtype=int)}, "that fit each other"),
        ({"items": np.array([1.0, 4.0, 0.0, 2.0])}, "that fit each other"),
        ({"held/image": np.array([True])}, "that fit each other"),
        ({"held/image": np.array([1, 0, 1, 1])}, "that fit each other"),
        ({"items": np.array([None] * 4)}, "expected a saved partition, got ValueError"),
    ],
)
def test_a_malformed_saved_partition_gets_one_line(damage: dict[str, np.ndarray], expected: str, tmp_path: Path):
    path = tmp_path / "partition.npz"
    np.savez(path, **(GOOD | damage))
    with pytest.raises(InputError, match=re.escape(f"{path}: ") + ".*" + expected) as caught:
        load_partition(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04cut off"])
def test_a_saved_partition_that_is_missing_or_damaged_gets_one_line(content: bytes | None, tmp_path: Path):
    path = tmp_path / "partition.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path}: expected a saved partition, got ")) as caught:
        load_partition(path)
    assert "\n" not in str(caught.value)
