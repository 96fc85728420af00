"""NumPy arrays in files that strangers may have written: nothing is unpickled, and nothing larger than it is believed.

What a header declares is compared with the bytes that are there before any memory is taken for it.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

Array = npt.NDArray[Any]

HEADER = 1 << 14
"""More bytes than any header that numpy accepts."""


def read_npy(path: Path) -> Array:
    """The array of a .npy file, mapped rather than read; what is written to it stays in this process.

    Raises ValueError, or whatever numpy trips on, where it is damaged, declares more than is there, or holds Python
    objects: to a caller any exception says that it is no such file.
    """
    with path.open("rb") as opened:
        shape, order, dtype, offset = _layout(opened.read(HEADER), path.stat().st_size)
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "c", offset, shape, order)


def read_npz(path: Path, limit: int) -> dict[str, Array]:
    """The arrays of an .npz archive by name, those of more than `limit` bytes refused. Raises as `read_npy` does."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename.removesuffix(".npy") for member in members]
        if len(set(names)) < len(names):
            raise ValueError(f"an archive with several arrays {Counter(names).most_common(1)[0][0]!r}")
        for member in members:
            if member.file_size > limit + HEADER:
                raise ValueError(f"{member.filename!r} of {member.file_size} bytes, where {limit} are the most")
        # a member that holds more than it declares is read no further, and fails its checksum
        return {name: _parse(archive.read(member)) for name, member in zip(names, members, strict=True)}


def _parse(content: bytes) -> Array:
    shape, order, dtype, offset = _layout(content[:HEADER], len(content))
    return np.ndarray(shape, dtype, content, offset, order=order).copy("K")  # one that may be written to


def _layout(head: bytes, size: int) -> tuple[tuple[int, ...], Any, np.dtype[Any], int]:
    """Shape, order, dtype and offset of the array in a .npy file of `size` bytes that begins with `head`."""
    opened = io.BytesIO(head)
    version = npy.read_magic(opened)
    if version not in ((1, 0), (2, 0)):  # 3.0 is for field names in Unicode
        raise ValueError(f"format version {version[0]}.{version[1]}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a header as Python 2 wrote it
        shape, fortran_order, dtype = read(opened)
    offset = opened.tell()
    if dtype.hasobject:
        raise ValueError(f"Python objects, {dtype}")
    if any(length < 0 for length in shape):
        raise ValueError(f"a shape of {list(shape)}")
    declared = math.prod(shape) * dtype.itemsize
    if declared > size - offset:
        raise ValueError(f"{list(shape)} {dtype}, which takes {declared} bytes, in {size - offset}")
    return shape, "F" if fortran_order else "C", dtype, offset
