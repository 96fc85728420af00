"""A data set divided into folders: what is in each, and what is refused before anything is there."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fedxmr import commands, sources
from fedxmr.data import Dataset, Scaling, load_dataset
from fedxmr.data import split as split_module
from fedxmr.data.__main__ import split
from fedxmr.data.split import divide, write
from fedxmr.errors import InputError
from fedxmr.partition import PartitionConfig, partition
from fedxmr.state import load
from fedxmr.types import DataSpec, Items
from tests.federations import SMALL, configured, federate

SCHEMES = st.sampled_from(
    [
        PartitionConfig(scheme="iid"),
        PartitionConfig(scheme="dirichlet", alpha=1.0),
        PartitionConfig(scheme="quantity"),
        PartitionConfig(scheme="missing-modality", missing=0.5),
        PartitionConfig(scheme="unpaired"),
    ]
)
DATA = [a for a in SMALL if a.startswith("dataset")]


def equal(one: Items, other: Items) -> bool:
    """Bit for bit, item by item, in the same order."""
    same_modalities = set(one.features) == set(other.features)
    return (
        same_modalities
        and all(torch.equal(x, other.features[m]) for m, x in one.features.items())
        and all(torch.equal(rows, other.rows[m]) for m, rows in one.rows.items())
        and torch.equal(one.labels, other.labels)
    )


def made_up(seed: int, *, complete: bool, sizes: tuple[int, int, int] = (30, 12, 9)) -> Dataset:
    """Items of four classes, of which nobody has the last, in several at once or in none; complete, or with gaps."""
    rng = np.random.default_rng(seed)
    dims = dict(zip(("audio", "image", "text"), rng.integers(1, 4, size=rng.integers(2, 4)).tolist(), strict=False))

    def items(count: int) -> Items:
        labels = torch.tensor(rng.random((count, 4)) < 0.5)
        labels[:, 3] = False
        has = {m: np.flatnonzero(complete | (rng.random(count) < 0.7)) for m in dims}
        features = {
            m: torch.tensor(rng.normal(size=(len(rows), dims[m])), dtype=torch.float32) for m, rows in has.items()
        }
        return Items(features, {m: torch.tensor(rows) for m, rows in has.items()}, labels)

    train, validation, test = map(items, sizes)
    vectors = torch.tensor(rng.normal(size=(4, 2)), dtype=torch.float32) if rng.random() < 0.5 else None
    return Dataset(
        name="made-up",
        spec=DataSpec(dims, 4, vectors),
        classes=("chat", "guinea pig", "bœuf", "unseen"),
        train=train,
        validation=validation,
        test=test,
        all_test=test,
        all_test_overlaps=False,
        scaling={m: str(rng.choice(get_args(Scaling))) for m in dims},
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), SCHEMES, st.integers(1, 4), st.booleans())
def test_what_is_read_is_bit_for_bit_what_the_client_has(seed, complete, scheme, clients, own_test):
    data = made_up(seed, complete=complete)
    try:
        parts = partition(data.train, clients, scheme, seed)
        divided = divide(data, parts, seed, own_test=own_test)
    except InputError:
        reject()
    with TemporaryDirectory() as place:
        folders = write(Path(place) / "out", divided)
        read = [load_dataset(str(folder)) for folder in folders]
    assert [one.name for one in read] == [f"client-{k}" for k in range(clients)]
    for part, one, own in zip(parts, read, divided, strict=True):
        assert equal(one.train, part.take(data.train))
        assert equal(one.validation, own.validation if own_test else data.validation)
        assert equal(one.test, own.test if own_test else data.test)
        assert one.spec.dims == data.spec.dims
        assert one.spec.num_classes == 4
        assert (one.spec.class_vectors is None) == (data.spec.class_vectors is None)
        assert one.spec.class_vectors is None or torch.equal(one.spec.class_vectors, data.spec.class_vectors)
        assert (one.classes, one.scaling) == (data.classes, data.scaling)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_test_items_that_are_divided_go_each_to_one_client(part):
    data = made_up(0, complete=True, sizes=(40, 31, 32))
    divided = divide(data, partition(data.train, 3, PartitionConfig(), 0), seed=0, own_test=True)
    whole = getattr(data, part)
    (modality, *_) = whole.modalities
    shares = [getattr(one, part) for one in divided]
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    given = torch.cat([share.features[modality] for share in shares]).tolist()
    assert sorted(given) == sorted(whole.features[modality].tolist())
    again, other = (
        divide(data, partition(data.train, 3, PartitionConfig(), 0), seed, own_test=True)[0] for seed in (0, 1)
    )
    assert equal(getattr(again, part), shares[0])
    assert not equal(getattr(other, part), shares[0])


def test_a_client_on_whose_items_nothing_could_be_measured_is_named():
    data = made_up(0, complete=True)
    parts = partition(data.train, 3, PartitionConfig(), 0)
    few, lonely, unlabelled = (data.test.select(torch.arange(n)) for n in (2, 9, 9))
    few.labels[:, 0] = True
    lonely.labels[:] = False
    lonely.labels[0, 0] = True
    unlabelled.labels[:] = False
    for items in (few, lonely):
        divide(replace(data, test=items), parts, seed=0)
    with pytest.raises(
        InputError, match=r"^client \d: expected a test \w+ that shares a class with some \w+, got none; "
    ):
        divide(replace(data, test=lonely), parts, seed=0, own_test=True)
    with pytest.raises(
        InputError, match=r"^client 2: expected test items with \w+, got none; lower --clients, choose "
    ):
        divide(replace(data, test=few), parts, seed=0, own_test=True)
    with pytest.raises(InputError, match=r"^made-up: expected a test \w+ that shares a class with some \w+, got none$"):
        divide(replace(data, test=unlabelled), parts, seed=0)


def run(*arguments: object) -> int:
    return commands.run({"split": split}, ["split", *map(str, arguments)])


MULTI_LABEL = ("dataset.labels_per_item=2", "dataset.classes=5")


@pytest.mark.parametrize(
    "scheme",
    [
        ("--partition", "dirichlet", "partition.alpha=0.3"),
        ("--partition", "missing-modality", "partition.missing=0.67"),
        ("--partition", "unpaired", "partition.unpaired=0.7"),
    ],
    ids=lambda scheme: scheme[1],
)
def test_a_folder_has_the_training_items_of_the_simulations_client(scheme, tmp_path, capsys):
    assert run("synthetic", *DATA, *MULTI_LABEL, *scheme, "--seed", 3, "--out", tmp_path / "out") == commands.OK
    config = configured(*MULTI_LABEL, f"partition.scheme={scheme[1]}", scheme[2], "seed=3")
    data, parts = sources.dataset(config), sources.parts(config)
    said = capsys.readouterr().out
    assert "note: synthetic: made-up items" in said
    for client, part in enumerate(parts):
        read = load_dataset(str(tmp_path / "out" / f"client-{client}"))
        assert equal(read.train, part.take(data.train))
        assert equal(read.validation, data.validation)
        assert equal(read.test, data.test)
        held = ", ".join(f"{m} {len(x)}" for m, x in sorted(read.train.features.items()) if len(x))
        assert f"client-{client}: training {len(part.items)} ({held}), validation 20, test 30\n" in said
    assert len(parts) == 3


def test_a_client_alone_with_its_folder_learns_what_it_learns_in_the_simulation(tmp_path):
    """In which it shares nothing and scales by what it has itself; a recommended scaling comes with the folder."""
    first = tmp_path / "first"
    assert run("synthetic", *DATA, "--clients", 1, "--out", first) == commands.OK
    (first / "client-0" / "scaling.json").write_text('{"text": "norm"}')
    assert run(first / "client-0", "--partition", "quantity", "--seed", 2, "--out", tmp_path / "out") == commands.OK
    alone = ("strategy=local", "seed=2", "federation.standardise=client")
    small = tuple(a for a in SMALL if not a.startswith("dataset"))
    whole = federate(
        tmp_path / "whole", f"dataset={first / 'client-0'}", *alone, "partition.scheme=quantity", base=small
    )
    of_folder = federate(
        tmp_path / "one", f"dataset={tmp_path / 'out' / 'client-0'}", *alone, "federation.clients=1", base=small
    )
    for part in ("validation", "test"):
        assert of_folder[part]["last"]["clients"] == whole[part]["last"]["clients"][:1]
    models = [load(tmp_path / run / "clients" / "0" / "last.safetensors")[0] for run in ("whole", "one")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_nothing_is_overwritten(there, tmp_path, capsys):
    out = tmp_path / "out"
    make = {"folder": out.mkdir, "file": out.touch, "link": lambda: out.symlink_to("nowhere")}
    make[there]()
    assert run("synthetic", *DATA, "--out", out) == commands.BAD_INPUT
    assert capsys.readouterr().err == f"error: {out}: already exists; choose another --out\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not out.is_dir() or not any(out.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["synthetic", "dataset.task=zero-shot"], "dataset.task: expected standard, got zero-shot"),
        (["synthetc"], "unknown dataset 'synthetc'; did you mean 'synthetic'?"),
        (["synthetic", *DATA, "--clients", "61"], "clients: expected 1 to 60"),
        (["synthetic", *DATA, "--test", "own", "--clients", "25"], "client 20: expected validation items with image"),
        (["synthetic", *DATA, "--test", "mine"], "'mine' is not one of"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(arguments, says, tmp_path, capsys):
    assert run(*arguments, "--out", tmp_path / "deep" / "out") == commands.BAD_INPUT
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_an_interrupt_half_way_leaves_nothing(tmp_path, monkeypatch, capsys):
    write_folder, written = split_module._write_folder, []

    def interrupted(folder: Path, data: Dataset) -> None:
        write_folder(folder, data)
        written.append(folder)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(split_module, "_write_folder", interrupted)
    assert run("synthetic", *DATA, "--out", tmp_path / "deep" / "out") == commands.INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted by SIGINT\n"
    assert len(written) == 2
    assert not any(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_leaves_nothing_and_is_named_in_one_line(tmp_path, capsys):
    out, limits = tmp_path / "deep" / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # bytes of a file; an archive of the split has less
    try:
        assert run("synthetic", *DATA, "--out", out) == commands.FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == f"error: {out}: File too large\n"
    assert not any(tmp_path.iterdir())


def test_where_no_folder_can_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("synthetic", *DATA, "--out", tmp_path / "file" / "out") == commands.BAD_INPUT
    assert capsys.readouterr().err == f"error: {tmp_path / 'file' / 'out'}: cannot be written: Not a directory\n"
