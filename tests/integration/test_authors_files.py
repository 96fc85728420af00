"""Feature files as the papers' authors lay them out: made here, of their sizes but narrow, and damaged ones."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.io import savemat

from fedxmr import commands, mat
from fedxmr.arrays import Array, read_npy
from fedxmr.data import Dataset, authors, load_dataset
from fedxmr.data.authors import labelled, read
from fedxmr.errors import InputError
from fedxmr.simulate import simulate
from fedxmr.types import Items


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDXMR_DATA", raising=False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Files are parsed in this process, which is quicker: for those that do not harm it."""

    @contextmanager
    def parsed(path: Path, names: Sequence[str]) -> Iterator[dict[str, Array]]:
        folder = tmp_path_factory.mktemp("parsed")
        try:
            mat._parse(str(path), folder, names)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        yield {name: read_npy(folder / f"{number}.npy") for number, name in enumerate(names)}

    monkeypatch.setattr(authors, "parsed", parsed)


def numbered(start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 2] and texts [n, 3] whose first column is the number of the pair, from `start`."""
    pair = np.arange(start, start + n, dtype=np.float32)[:, None]
    return np.hstack([pair, np.ones_like(pair)]), np.hstack([pair, pair, pair])


def fedcmr(folder: Path, labels: np.ndarray, pattern: str = "{}.mat", start: int = 0) -> None:
    image, text = numbered(start, len(labels))
    for what, array in (("imgs", image), ("texts", text), ("labels", labels)):
        path = folder / pattern.format(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        savemat(path, {"labels" if what == "labels" else "features": array})


def dscmr(folder: Path, part: str, labels: np.ndarray, start: int = 0) -> None:
    image, text = numbered(start, len(labels))
    folder.mkdir(exist_ok=True)
    for what, array in (("img", image), ("txt", text), ("img_lab", labels)):
        savemat(folder / f"{part}_{what}.mat", {f"{part}_{what}": array})


def classes(n: int, of: int) -> np.ndarray:
    """Class numbers from 0 in a column, every class as often as the next."""
    return (np.arange(n) % of)[:, None]


def pairs(items: Items) -> list[int]:
    """The number of each pair, which its image and its text agree on."""
    assert items.features["image"][:, 0].equal(items.features["text"][:, 0])
    return items.features["image"][:, 0].int().tolist()


def fits(data: Dataset, name: str) -> None:
    """What is true of every data set of pairs."""
    assert data.name == name
    assert data.spec.dims == {"image": 2, "text": 3}
    assert len(data.classes) == data.spec.num_classes == data.train.labels.shape[1]
    used = [set(pairs(part)) for part in (data.train, data.validation, data.test)]
    assert sum(map(len, used)) == len(set.union(*used))
    overlapping = set(pairs(data.all_test)) & used[1]
    assert bool(overlapping) == data.all_test_overlaps
    assert all(note.startswith(f"{name}: ") for note in data.notes)


def refusal(name: str, folder: Path | None, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset(name, options, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# the authors' layouts


def test_fedcmrs_pascal_is_its_first_800_its_next_100_and_its_last_100_rows(tmp_path, here):
    fedcmr(tmp_path / "Pascal", classes(1000, 20) + 1, "{}_shuffled.mat")
    data = load_dataset("pascal-vgg", data_dir=tmp_path)
    fits(data, "pascal-vgg")
    assert [pairs(part) for part in (data.train, data.validation, data.test)] == [
        list(range(800)),
        list(range(800, 900)),
        list(range(900, 1000)),
    ]
    assert pairs(data.all_test) == pairs(data.test)
    assert data.test.labels.int().argmax(1).tolist() == [i % 20 for i in range(900, 1000)]
    assert data.test.labels.sum(1).tolist() == [1] * 100


def test_fedcmrs_mirflickr_keeps_several_labels_and_the_rows_its_code_skips_are_for_validation(tmp_path, here):
    hot = (np.arange(20015)[:, None] % np.arange(2, 26) == 0) | np.eye(24, dtype=bool)[np.arange(20015) % 24]
    fedcmr(tmp_path, hot.astype(np.uint8))
    data = load_dataset("mirflickr", data_dir=tmp_path)
    fits(data, "mirflickr")
    assert (len(data.train), pairs(data.validation)) == (16012, list(range(16012, 18013)))
    assert pairs(data.test) == list(range(18013, 20015))
    np.testing.assert_array_equal(data.test.labels.numpy(), hot[18013:])


def test_fedcmrs_wikipedia_has_training_and_test_in_folders(tmp_path, here):
    fedcmr(tmp_path, classes(2173, 10) + 1, "train/train_{}.mat")
    fedcmr(tmp_path, classes(462, 10) + 1, "test/test_{}.mat", start=5000)
    data = load_dataset("wikipedia-vgg", data_dir=tmp_path)
    fits(data, "wikipedia-vgg")
    assert pairs(data.test) == list(range(5000, 5462))
    assert sorted(pairs(data.train) + pairs(data.validation)) == list(range(2173))
    assert len(data.validation) == 217  # a tenth, for there is none in the files
    assert set(data.validation.labels.sum(0).tolist()) <= {21, 22}
    assert any("217 of 2173 training pairs are, drawn by seed 0" in note for note in data.notes)
    other = load_dataset("wikipedia-vgg", {"split_seed": 1}, tmp_path)
    assert pairs(other.validation) != pairs(data.validation)

    fedcmr(tmp_path, classes(693, 10) + 1, "test/test_{}.mat", start=5000)
    longer = load_dataset("wikipedia-vgg", data_dir=tmp_path)
    assert (len(longer.train), pairs(longer.validation)) == (2173, list(range(5000, 5231)))
    assert pairs(longer.test) == list(range(5231, 5693))


def test_dscmrs_test_files_are_divided_by_class_where_they_hold_the_validation_pairs_too(tmp_path, monkeypatch, here):
    dscmr(tmp_path / "nuswide", "train", classes(8000, 10))
    dscmr(tmp_path / "nuswide", "test", np.sort(classes(2000, 10), axis=0), start=8000)  # in the order of the classes
    monkeypatch.setenv("FEDXMR_DATA", str(tmp_path))
    data = load_dataset("nus-wide-10k")
    fits(data, "nus-wide-10k")
    assert pairs(data.train) == list(range(8000))
    assert data.validation.labels.sum(0).tolist() == data.test.labels.sum(0).tolist() == [100] * 10
    assert pairs(data.all_test) == list(range(8000, 10000))
    assert any("into 1000 validation and 1000 test pairs by seed 0" in note for note in data.notes)


def test_other_sizes_are_taken_only_on_demand_and_a_whole_files_rows_in_the_papers_proportion(tmp_path, here):
    fedcmr(tmp_path, classes(90, 20) + 1)
    said = refusal("pascal-vgg", tmp_path)
    assert said == (
        f"{tmp_path}: expected 800 training and 100 or 200 further pairs, got 80 training and 10 further pairs; "
        "dataset.any_size=true takes them nevertheless"
    )
    data = load_dataset("pascal-vgg", {"any_size": True}, tmp_path)
    fits(data, "pascal-vgg")
    assert pairs(data.test) == list(range(80, 90))
    assert len(data.validation) == 8
    assert data.notes[-1] == "pascal-vgg: 80 training and 10 further pairs, not the papers' sizes"
    fedcmr(tmp_path, np.array([[1]]))
    assert "got 0 training and 1 further pairs" in refusal("pascal-vgg", tmp_path, any_size=True)


def test_one_hot_labels_are_read_as_class_numbers_are(tmp_path, here):
    for part, n in (("train", 30), ("test", 10)):
        dscmr(tmp_path / "numbers", part, classes(n, 20))
        dscmr(tmp_path / "hot", part, np.eye(20)[np.arange(n) % 20])
    numbers, hot = (load_dataset("pascal-vgg", {"any_size": True}, tmp_path / kind) for kind in ("numbers", "hot"))
    assert numbers.sha256 == hot.sha256


@pytest.mark.parametrize(
    ("found", "first", "expected"),
    [
        ([[[1], [2], [3]]], 0, [[0, 1, 2]]),  # a 3 of 3 classes: from 1
        ([[[0], [1], [1]]], 1, [[0, 1, 1]]),  # a 0: from 0
        ([[[1], [2]], [[3]]], 0, [[0, 1], [2]]),  # parts count alike
        ([[[1, 2, 1, 2]]], 0, [[1, 2, 1, 2]]),  # neither, and in a row
        ([[[1, 2, 1, 2]]], 1, [[0, 1, 0, 1]]),
        ([[[0, 1, 0], [0, 0, 1]]], 1, [[1, 2]]),
    ],
)
def test_class_numbers_count_from_what_is_among_them(found, first, expected):
    labels = labelled({str(i): torch.tensor(x).float() for i, x in enumerate(found)}, 3, first)
    assert [x.int().argmax(1).tolist() for x in labels] == expected
    assert all((x.sum(1) == 1).all() and x.shape[1] == 3 for x in labels)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([[0.0], [3.0]], "x: expected class numbers from 1 to 3, got 0 in row 0"),
        ([[1.0], [1.5]], "x: expected class numbers from 1 to 3, got 1.5 in row 1"),
        ([[-1.0], [2.0]], "x: expected class numbers from 1 to 3, got -1 in row 0"),
        ([[7.0], [2.0]], "x: expected class numbers from 1 to 3, got 7 in row 0"),
        ([[0.0, 1.0], [1.0, 0.0]], "x: expected labels [n, 3], or class numbers [n, 1], got [2, 2]"),
        ([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], "x: expected 0 and 1 only in 3 columns, got other numbers"),
    ],
)
def test_labels_that_can_be_none_get_one_line(found, says):
    with pytest.raises(InputError, match="^" + re.escape(says)):
        labelled({"x": torch.tensor(found)}, 3, 1)


# files that are not there, or do not fit together


def test_missing_files_get_a_line_that_says_what_is_looked_for_and_where(tmp_path):
    said = refusal("coco", tmp_path)
    for part in (
        "imgs.mat, texts.mat and labels.mat, or imgs_shuffled.mat ..., or train/train_imgs.mat",
        "train_img.mat, train_txt.mat and train_img_lab.mat",
        f"looked in {tmp_path}, {tmp_path / 'coco'}, {tmp_path / 'MS-COCO'};",
        "nobody publishes its features",
    ):
        assert part in said
    assert "https://github.com/penghu-cs/DSCMR" in refusal("pascal-vgg", tmp_path)
    assert "for none was named by --data-dir or FEDXMR_DATA" in refusal("xmedia", None)
    assert refusal("xmedia", tmp_path / "typo").startswith("--data-dir: expected a folder, got ")


def test_a_layout_is_read_whole_and_alone_unless_another_is_asked_for(tmp_path, here):
    dscmr(tmp_path, "train", classes(30, 20))
    assert refusal("pascal-vgg", tmp_path).endswith("got no test_img.mat, test_txt.mat, test_img_lab.mat")
    dscmr(tmp_path, "test", classes(10, 20), start=30)
    fedcmr(tmp_path, classes(90, 20) + 1)
    assert "expected the files of one layout, got some of imgs.mat, " in refusal("pascal-vgg", tmp_path)
    data = load_dataset("pascal-vgg", {"layout": "dscmr", "any_size": True}, tmp_path)
    assert pairs(data.test) == list(range(30, 40))


def _texts(**variables: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: savemat(folder / "test_txt.mat", variables)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_texts(features=np.ones((10, 3))), "test_txt.mat: expected a variable 'test_txt', got 'features'"),
        (_texts(test_txt=np.ones((9, 3))), "test_txt.mat: expected 10 rows, one per label of test_img_lab.mat, got 9"),
        (_texts(test_txt=np.ones((10, 4))), "expected equal widths in training and test, got "),
        (_texts(test_txt=np.ones((10, 3, 2))), "test_txt.mat: expected test_txt to be [n, d] numbers, got [10, 3, 2]"),
        (_texts(test_txt=np.full((10, 3), np.nan)), "test_txt.mat: expected finite numbers below 1e+18 in test_txt, "),
        (_texts(test_txt=np.full((10, 3), 1e200)), "test_txt.mat: expected finite numbers below 1e+18 in test_txt, "),
        (lambda folder: savemat(folder / "test_txt_lab.mat", {"test_txt_lab": classes(10, 20)[::-1]}),
         "expected the same labels in test_img_lab.mat and its texts', got others"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_together_get_one_line(tmp_path, change, says, here):
    dscmr(tmp_path, "train", classes(30, 20))
    dscmr(tmp_path, "test", classes(10, 20))
    change(tmp_path)
    said = refusal("pascal-vgg", tmp_path, any_size=True)
    assert said.startswith(str(tmp_path))
    assert says in said


# files that strangers wrote

MATRIX = np.arange(12.0).reshape(4, 3)


def content(compressed: bool = False, **variables: Any) -> bytes:
    written = io.BytesIO()
    savemat(written, variables, do_compression=compressed)
    return written.getvalue()


DENSE, DEFLATED = content(x=MATRIX), content(compressed=True, x=MATRIX)
SPARSE = content(x=scipy.sparse.csc_matrix(MATRIX))


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        # data of a type that there is not: scipy 1.17's parser dies of it
        (DENSE.replace(struct.pack("<2I", 9, 96), struct.pack("<2I", 20, 96)), "expected a MATLAB file, got one "),
        (DENSE[:-40], "expected a MATLAB file, got one that cannot be read"),
        (DEFLATED[:150] + b"\xff\xff" + DEFLATED[152:], "expected a MATLAB file, got one that cannot be read"),
        (content(x=scipy.sparse.csc_matrix((2**31 - 1, 30))), "expected arrays that fit into the "),
        (bytes(4) + struct.pack("<4i", 2**31 - 1, 2**31 - 1, 0, 2) + b"x\0", "expected a"),  # version 4
    ],
)
def test_a_damaged_file_gets_one_line_and_harms_no_other_process(tmp_path, damaged, says):
    assert damaged not in (DENSE, DEFLATED)
    refused(tmp_path, damaged, says)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (SPARSE.replace(struct.pack("<3i", 1, 2, 3), struct.pack("<3i", 1, 2, 99)), "expected x to be a sparse matrix"),
        (content(x=np.array([MATRIX, "cell"], dtype=object)), "expected x to be an array of numbers, got [1, 2] obj"),
        (content(x={"a": 1}), "expected x to be an array of numbers, got [1, 1] [('a', 'O')]"),
        (content(x="text"), "expected x to be an array of numbers, got [1] <U4"),
        (content(x=MATRIX * 1j), "expected x to be an array of numbers, got [4, 3] complex128"),
        (content(y=MATRIX), "expected a variable 'x', got 'y'"),
        (b"", "expected a MATLAB file, got one that cannot be read"),
    ],
)
def test_a_file_of_other_things_than_arrays_of_numbers_gets_one_line(tmp_path, here, other, says):
    refused(tmp_path, other, says)


def refused(folder: Path, written: bytes, says: str) -> None:
    path = folder / "x.mat"
    path.write_bytes(written)
    with pytest.raises(InputError) as caught:
        read(path, ["x"])
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (
            b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM",
            "got one of version 7.3 (HDF5); load it in MATLAB and save",
        ),
        (b"\x89HDF\r\n\x1a\n", "got one of version 7.3 (HDF5)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "got Git LFS's pointer to it, which `git lfs"),
    ],
)
def test_a_file_of_a_known_other_kind_gets_a_line_that_says_what_to_do(tmp_path, head, says):
    path = tmp_path / "x.mat"
    path.write_bytes(head + bytes(512))
    with pytest.raises(InputError, match=re.escape(says)):
        read(path, ["x"])


def test_a_parser_that_dies_or_does_not_return_gets_one_line(tmp_path, monkeypatch):
    path = tmp_path / "x.mat"
    path.write_bytes(DENSE)
    monkeypatch.setattr(mat, "PATIENCE", 0.01)
    with pytest.raises(InputError, match=r"x\.mat: expected a MATLAB file, got one that is not read in 0 s$"):
        read(path, ["x"])
    monkeypatch.undo()
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -SEGV $$\n")
    dying.chmod(0o700)
    monkeypatch.setattr(mat.sys, "executable", str(dying))
    with pytest.raises(InputError, match=r"x\.mat: expected a MATLAB file, got one at which .* died of SIGSEGV$"):
        read(path, ["x"])


def test_dense_sparse_and_compressed_matrices_are_read_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    path = tmp_path / "it is; here.mat"
    for sound in (SPARSE, DEFLATED, content(y=np.ones((1, 1)), x=MATRIX.astype(">i2"))):
        path.write_bytes(sound)
        np.testing.assert_array_equal(read(path, ["x"])["x"].numpy(), MATRIX)
    assert not list((tmp_path / "tmp").iterdir())


# XMedia

ROWS = {"I_{}_CNN": (12, 6, 5, "{}ImgCat"), "T_{}_BOW": (12, 6, 4, "{}TxtCat"), "V_{}_CNN": (8, 6, 5, "{}VidCat"),
        "A_{}": (8, 5, 3, "{}AudCat"), "d3_{}": (8, 4, 6, "{}3dCat")}  # fmt: skip
NAMES = dict(zip(ROWS, ("image", "text", "video", "audio", "3d"), strict=True))


def xmedia(path: Path, **change: np.ndarray) -> dict[str, np.ndarray]:
    """A small XMediaFeatures.mat of 4 of the 20 classes, and what is in it."""
    rng = np.random.default_rng(0)
    variables: dict[str, np.ndarray] = {}
    for features, (train, test, width, labels) in ROWS.items():
        for part, n in (("tr", train), ("te", test)):
            variables[labels.format(part)] = np.arange(n)[None] % 4 + 1
            variables[features.format(part)] = rng.normal(size=(n, width)).astype(np.float32)
    savemat(path, variables | change)
    return variables


def test_xmedias_images_and_texts_are_pairs_and_the_first_half_of_each_modality_is_for_test(tmp_path, here):
    there = xmedia(tmp_path / "XMediaFeatures.mat", I_tr=np.array(["not read"], dtype=object))
    data = load_dataset("xmedia", {"any_size": True}, tmp_path)
    assert data.spec.dims == {"image": 5, "text": 4, "video": 5, "audio": 3, "3d": 6}
    assert [len(p) for p in (data.train, data.validation, data.test)] == [12 + 3 * 8, 3 + 3 + 3 + 2, 3 + 3 + 2 + 2]
    assert len(data.all_test) == 6 + 6 + 5 + 4
    assert data.train.rows["image"].equal(data.train.rows["text"])
    for variable, modality in NAMES.items():
        train, held = there[variable.format("tr")], there[variable.format("te")]
        half = len(held) // 2
        cuts = ((data.train, train), (data.test, held[:half]), (data.validation, held[half:]), (data.all_test, held))
        for part, expected in cuts:
            np.testing.assert_array_equal(part.features[modality].numpy(), expected)
            numbers = there[ROWS[variable][3].format("tr" if part is data.train else "te")][0] - 1
            start = half if part is data.validation else 0
            own = part.labels[part.rows[modality]].int().argmax(1)
            np.testing.assert_array_equal(own.numpy(), numbers[start : start + len(expected)])
    singles = torch.cat([data.train.rows[m] for m in ("image", "video", "audio", "3d")])
    assert sorted(singles.tolist()) == list(range(len(data.train)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trTxtCat": np.ones((1, 12))}, "expected the same labels of images and texts in tr, row by row, got others"),
        ({"A_te": np.ones((4, 3))}, "expected as many rows in A_te as labels, 2 or more, got 4 and 5"),
        ({"A_te": np.ones((5, 2))}, "expected A_te to be as wide as for training, 3, got 2"),
        ({"te3dCat": np.full((1, 4), 21)}, ": te3dCat: expected class numbers from 1 to 20, got 21 in row 0"),
    ],
)
def test_xmedia_variables_that_do_not_fit_together_get_one_line(tmp_path, change, says, here):
    xmedia(tmp_path / "XMediaFeatures.mat", **change)
    assert says in refusal("xmedia", tmp_path, any_size=True)


def test_five_modalities_of_which_most_items_have_one_are_learned_from(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    xmedia(tmp_path / "XMediaFeatures.mat")
    arguments = ["--dataset", "xmedia", "--data-dir", ".", "--clients", "2", "--engine", "local", "--out", "run"]
    small = ["learner.hidden=4", "learner.width=4", "federation.rounds=2"]
    assert commands.run(simulate, [*arguments, "--no-pictures", *small, "dataset.any_size=true"]) == commands.OK
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]["selected"]["mean"]
    assert len(scores) == 21  # 20 directions and their average
