"""How items look to a person: what a page of examples shows of them. Read only when somebody asks for such a page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedxmr.errors import InputError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".gif": "GIF", ".webp": "WEBP"}
"""The image files that can be shown: how their names end, and what they then have to be."""

SIDE = 160
"""The longest side of a shown image, in pixels."""


@dataclass(frozen=True)
class Look:
    """How an item looks in one modality.

    text: words, from whoever made the data. image: the address of an <img> that holds the picture itself; "" for none.
    """

    text: str = ""
    image: str = ""


@dataclass(frozen=True)
class Looks:
    """What can be shown of a data set's test items; by default nothing.

    of: modality -> how the item of a number looks in it; of a modality that is not there nothing can be shown.
    numbers: "test" and "all_test" -> [n] int64, the number that each item of this part goes by.
    """

    of: Mapping[str, Callable[[int], Look]] = field(default_factory=dict)
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_one_part(cls, of: Mapping[str, Callable[[int], Look]], numbers: Tensor) -> Looks:
        """Where "test" and "all_test" are the same items."""
        return cls(of, {"test": numbers, "all_test": numbers})

    def kept(self, index: Mapping[str, Tensor]) -> Looks:
        """Those of some items of each part; index: part -> [k] int64."""
        return replace(self, numbers={part: numbers[index[part]] for part, numbers in self.numbers.items()})

    def number(self, part: str, item: int) -> int:
        """What the item at a place in a part goes by: its number, or that place."""
        return int(self.numbers[part][item]) if part in self.numbers else item

    def show(self, part: str, item: int, modality: str) -> Look:
        """How the item at a place in a part looks in a modality. Raises InputError for an image that is damaged."""
        return self.of[modality](self.number(part, item)) if modality in self.of else Look()


def pixels(images: Tensor, highest: float) -> Callable[[int], Look]:
    """Images [n, h, w] of ink from 0 to `highest` as PNG, dark on light and enlarged without smoothing."""

    def show(item: int) -> Look:
        from PIL import Image

        ink = images[item].clamp(0, highest) * (255 / highest)
        times = max(1, SIDE // 2 // max(ink.shape))
        drawn = Image.fromarray((255 - ink).round().to(torch.uint8).numpy())
        return Look(image=_address(drawn.resize((drawn.width * times, drawn.height * times), 0), "PNG"))

    return show


def check_image(path: Path) -> None:
    """See that a file is an image such as its name says, by how it begins. Raises InputError."""
    with _opened(path):
        pass


def thumbnail(path: Path) -> str:
    """An image file as the address of an <img>, no side longer than SIDE. Raises InputError."""
    from PIL import ImageOps

    with _opened(path) as image:
        image.thumbnail((SIDE, SIDE))
        return _address(ImageOps.exif_transpose(image).convert("RGBA"), "WEBP")


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """A file of one of the FORMATS. Whatever reading it trips on within becomes an InputError."""
    from PIL import Image

    expected = FORMATS[path.suffix.lower()]
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path, formats=(expected,)) as image,
        ):
            yield image
    except Exception as error:  # OSError, SyntaxError, DecompressionBombError ...
        raise InputError(f"{path}: expected a readable {expected} image, got {one_line(error)}") from error


def _address(image: Image, format: str) -> str:
    content = io.BytesIO()
    image.save(content, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
