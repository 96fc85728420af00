"""Files that strangers wrote: whatever is wrong with one, it gets one line, runs nothing and takes little memory."""

from __future__ import annotations

import hashlib
import io
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from fedxmr.data import load_dataset
from fedxmr.data.files import matrix, read_mat
from fedxmr.errors import InputError
from fedxmr.partition import load_partition

N = 12
LITTLE = 8_000_000
"""Bytes: far more than any sound file here needs, far less than what a damaged one may ask for."""

FUZZ = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails where Python or NumPy take much memory in between, even if they give it back."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LITTLE
    finally:
        tracemalloc.stop()


def read(load: Callable[[], object]) -> str:
    """What is wrong with a file, in one line; empty for a sound one."""
    try:
        with little_memory():
            load()
    except InputError as error:
        assert str(error)
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mine"
    (made / "features").mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(made / "features" / "image.npy", rng.normal(size=(N, 4)))
    np.save(made / "features" / "text.npy", rng.integers(9, size=(N, 3)))
    np.save(made / "labels.npy", np.arange(N) % 3)
    np.savez(made / "split.npz", train=np.arange(6), validation=np.arange(6, 9), test=np.arange(9, 12))
    return made


def npy(shape: object, descr: object = "<f8", body: bytes = bytes(96), fortran: object = False, version=1) -> bytes:
    """A .npy file that says what it is told to."""
    header = str({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + body


FEATURES = "features/text.npy"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (npy((2**40, 2**40)), "takes"),
        (npy((2**32, 2**32)), "takes"),  # in 64 bits the product is 0
        (npy((10**30, 1)), "takes"),
        (npy((N, 2)), "takes 192 bytes, in 96"),
        (npy((-3, -4)), "a shape of [-3, -4]"),
        (npy((-1, 12)), "a shape of [-1, 12]"),
        (npy((2**60, 3), "|V0", b""), "expected [n, d] numbers"),
        (npy((0, 2**40)), "expected [n, d] numbers, got [0, 1099511627776] float64"),
        (npy((0, 2**62)), "too big"),
        (npy((N,), "|O"), "Python objects"),
        (npy((N, 1), [("a", "|O")]), "Python objects"),
        (npy((N, 1), [("a", "<f4"), ("b", "<i4")]), "expected [n, d] numbers, got [12, 1] [('a', '<f4')"),
        (npy((N, 1), [("a\nb", "<f8")]), "expected [n, d] numbers, got [12, 1] [('a\\nb'"),
        (npy((N, 1), "<M8[s]"), "expected [n, d] numbers, got [12, 1] datetime64[s]"),
        (npy((N, 1), "__import__('os').abort()"), "not a valid dtype descriptor"),
        (npy((N, 1), fortran="yes"), "fortran_order is not a valid bool"),
        (npy((N, 1), version=3), "format version 3.0"),
        (npy((N, 1), version=9), "format version 9.0"),
        (npy("__import__('os').abort()"), "shape is not valid"),
        (b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{" * 40, "got "),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000, "got "),
        (b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 8999 + b"1", "got "),
        (b"\x93NUMPX" + npy((N, 1))[6:], "magic"),
        (b"\x80\x04cos\nabort\n(tR.", "magic"),  # a pickle
        (b"", "got "),
    ],
)
def test_an_array_file_that_is_not_what_it_says_gets_one_line(folder, content, says):
    (folder / FEATURES).write_bytes(content)
    said = read(lambda: load_dataset(str(folder)))
    assert said.startswith(str(folder / FEATURES))
    assert says in said


@pytest.mark.parametrize("descr", ["<f8", ">f8", "<f4", ">i2", "<u8", "|i1", "<f2", "<f16"])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_any_byte_order_width_and_memory_order_of_numbers_is_read(folder, descr, fortran, version):
    given = np.arange(N * 3).reshape(N, 3)
    body = given.astype(descr).tobytes("F" if fortran else "C")
    (folder / FEATURES).write_bytes(npy((N, 3), descr, body, fortran, version))
    data = load_dataset(str(folder))
    np.testing.assert_array_equal(data.train.features["text"].numpy(), given[:6])


def archive(path: Path, *members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as opened:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            opened.writestr(f"{name}.npy", content)


SOUND = [(part, npy((3,), "<i8", np.arange(i, i + 3).astype("<i8").tobytes())) for part, i in
         (("train", 0), ("validation", 3), ("test", 6))]  # fmt: skip


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([*SOUND, SOUND[0]], "several arrays 'train'"),
        ([*SOUND, ("train", b"")], "several arrays 'train'"),
        ([*SOUND[1:], ("train", npy((2**40,), "<i8"))], "takes"),
        ([*SOUND[1:], ("train", npy((3,), "|O"))], "Python objects"),
        ([*SOUND[1:], ("train", npy((50_000_000,), "|i1", bytes(50_000_000)))], "where 96 are the most"),  # a zip bomb
        ([*SOUND, *((f"x{i}", b"") for i in range(2000))], "got "),
        ([*SOUND[1:], ("train", b"\x80\x04cos\nabort\n(tR.")], "magic"),
        ([*SOUND[1:], ("train", npy((-3,), "<i8"))], "a shape of [-3]"),
    ],
)
def test_an_archive_that_is_not_what_it_says_gets_one_line(folder, members, says):
    archive(folder / "split.npz", *members)
    said = read(lambda: load_dataset(str(folder)))
    assert said.startswith(str(folder / "split.npz"))
    assert says in said


def test_an_archive_whose_member_holds_more_than_it_declares_is_read_no_further(folder):
    path = folder / "split.npz"
    bomb = npy((50_000_000,), "|i1", bytes(50_000_000))
    archive(path, *SOUND[1:], ("train", bomb))
    content = path.read_bytes()
    assert len(content) < 100_000
    path.write_bytes(content.replace(struct.pack("<I", len(bomb)), struct.pack("<I", 200)))
    assert "expected an .npz archive without Python objects" in read(lambda: load_dataset(str(folder)))


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bytes changed, removed, put in or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        few = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, bytes(4), b"\xff" * 8, b"\x80"]))
        match draw(st.sampled_from(["overwrite", "insert", "delete", "cut"])):
            case "overwrite":
                changed[at : at + len(few)] = few
            case "insert":
                changed[at:at] = few
            case "delete":
                del changed[at : at + len(few)]
            case "cut":
                del changed[at:]
    return bytes(changed)


@FUZZ
@given(data=st.data(), name=st.sampled_from([FEATURES, "labels.npy", "split.npz"]))
def test_no_damage_to_a_folder_raises_anything_but_one_line(folder, data, name):
    sound = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damages(sound)))
    try:
        read(lambda: load_dataset(str(folder)))
    finally:
        (folder / name).write_bytes(sound)


LENGTHS = st.integers(-3, 20) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, 10**30]) | st.booleans()
DTYPES = st.sampled_from([
    "<f8", ">f4", "|b1", "<i8", ">u2", "|O", "|V0", "|S0", "<U4", "<c16", "<M8[ns]", "<m8", "|V7", "f", "<f99", "", "a",
    [("a", "<f4")], [("a", "|O")], [("a", "<f4", (3,))], [("a", [("b", "<i4")])], [("a", "<f4", (2**31, 2**31))], [],
])  # fmt: skip


@FUZZ
@given(
    shape=st.lists(LENGTHS, max_size=4).map(tuple) | st.sampled_from([(), [], None, 5, "()"]),
    descr=DTYPES,
    fortran=st.booleans() | st.none(),
    body=st.sampled_from([b"", bytes(96), bytes(range(96)), bytes(3000)]),
    name=st.sampled_from([FEATURES, "labels.npy"]),
)
def test_no_header_raises_anything_but_one_line(folder, shape, descr, fortran, body, name):
    sound = (folder / name).read_bytes()
    (folder / name).write_bytes(npy(shape, descr, body, fortran))
    try:
        read(lambda: load_dataset(str(folder)))
    finally:
        (folder / name).write_bytes(sound)


@FUZZ
@given(data=st.data())
def test_no_damage_to_a_saved_partition_raises_anything_but_one_line(tmp_path, data):
    content = io.BytesIO()
    arrays = {"items": np.array([1, 4, 0, 2]), "offsets": np.array([0, 2, 2, 4]), "held/image": np.ones(4, dtype=bool)}
    np.savez(content, **arrays)
    path = tmp_path / "partition.npz"
    path.write_bytes(data.draw(damages(content.getvalue())))
    read(lambda: load_partition(path))


MATRIX = np.arange(12.0).reshape(4, 3)


def mat(**variables: object) -> bytes:
    content = io.BytesIO()
    savemat(content, variables, do_compression=bool(variables.pop("compressed", False)))
    return content.getvalue()


SPARSE = mat(x=scipy.sparse.csc_matrix(MATRIX))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (mat(x={"a": 1}), "expected x to be [4, 3] numbers, got dict"),
        (mat(x=np.array([1, "a"], dtype=object)), "expected x to be [4, 3] numbers, got "),
        (mat(x="text"), "expected x to be [4, 3] numbers, got str"),
        (mat(x=MATRIX.T), "expected x to be [4, 3] numbers, got [3, 4] float64"),
        (mat(x=MATRIX * 1j), "got [4, 3] complex128"),
        (mat(y=MATRIX), "got NoneType"),
        (mat(x=scipy.sparse.csc_matrix((2**31 - 1, 3))), "expected x to be [4, 3] numbers, got csc_matrix"),
        (SPARSE.replace(struct.pack("<3i", 1, 2, 3), struct.pack("<3i", 1, 2, 9_999_999)), "to be a sparse matrix"),
        (b"\x89HDF\r\n\x1a\n" + bytes(512), "expected a MATLAB file"),  # a damaged v7.3
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM\x89HDF\r\n\x1a\n" + bytes(512), "expected a MATLAB file"),
        (b"", "expected a MATLAB file"),
        (bytes(4) + struct.pack("<4i", 2**31 - 1, 2**31 - 1, 0, 2) + b"x\0", "expected a MATLAB file"),  # v4
    ],
)
def test_a_published_matlab_file_that_is_not_what_is_expected_gets_one_line(tmp_path, content, says):
    read_mat_file(tmp_path, mat(x=MATRIX), mat(x=MATRIX))  # scipy is imported
    assert says in read_mat_file(tmp_path, content, content)


def test_a_dense_and_a_sparse_matrix_are_read(tmp_path):
    path = tmp_path / "x.mat"
    for content in (SPARSE, mat(x=MATRIX)):
        path.write_bytes(content)
        found = matrix(path, read_mat(path, hashlib.sha256(content).hexdigest()), "x", (4, 3))
        np.testing.assert_array_equal(found.numpy(), MATRIX)


def read_mat_file(folder: Path, content: bytes, published: bytes) -> str:
    path = folder / "x.mat"
    path.write_bytes(content)
    return read(lambda: matrix(path, read_mat(path, hashlib.sha256(published).hexdigest()), "x", (4, 3)))


@FUZZ
@given(data=st.data(), sparse=st.booleans(), compressed=st.booleans())
def test_no_damage_to_a_matlab_file_raises_anything_but_one_line(tmp_path, data, sparse, compressed):
    """Nor does it end this process, as scipy's parser does at some of these files: it never gets them."""
    content = mat(x=scipy.sparse.csc_matrix(MATRIX) if sparse else MATRIX, compressed=compressed)
    damaged = content[:128] + data.draw(damages(content[128:]))
    said = read_mat_file(tmp_path, damaged, content)
    assert ("expected sha256" in said) == (damaged != content)
