"""Image-text benchmarks of the papers in the feature files of FedCMR's or of DSCMR's authors, which the user brings.

Both put one pair in a row of [n, d] features, and a pair's class number, or [n, C] of 0 and 1, in a row of labels. What
their code reads (hasakiXie123/FedCMR, data_loader.py; penghu-cs/DSCMR, load_data.py), and so what is recognised here:

    fedcmr   imgs.mat, texts.mat (variable `features`) and labels.mat (`labels`) with all pairs, in Pascal's names with
             `_shuffled` before the dot: the first rows are for training, the last for test. Or train/train_imgs.mat ...
             and test/test_imgs.mat ..., of whose rows the last are for test. Class numbers count from 1.
    dscmr    train_img.mat, train_txt.mat, train_img_lab.mat and test_..., each with a variable of the file's name, and
             train_txt_lab.mat and test_txt_lab.mat where they are there. Class numbers count from 0.

A 0 among the numbers, or a C, overrules what they count from. FedCMR's code calls the rows between training and test
`val` in Pascal and skips them elsewhere; here all are validation pairs. DSCMR's code knows none: test files that hold
both parts are divided by a seed, by class. Where no rows are left, a tenth of the training pairs is drawn.

The authors publish Pascal's files alone, and nobody says how many rows the others' have. The papers' sizes are checked:
FedCMR's Table 1 (Wikipedia, MIRFlickr, MS-COCO), DRSL's section 4.1 (Pascal, NUS-WIDE-10K), MCCN's Table 1 (XMediaNet,
without its videos) and DLSL's section III (CUB images, each with its text). The rows outside training may be the test
pairs alone, or with those for validation as many as the usual versions of the data sets have: 20015 pairs of MIRFlickr
in all, 40137 held-out ones of MS-COCO, 693 of Wikipedia.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from fedxmr.data.authors import labelled, not_found, places, read
from fedxmr.data.dataset import Dataset
from fedxmr.data.splits import stratified, stratified_labels
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items


class Options(BaseModel):
    """Whose files they are, whether they may be of other sizes, and the seed of a validation part that is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Literal["auto", "fedcmr", "dscmr"] = Field(
        "auto", description="whose files: FedCMR's authors', DSCMR's authors', or as the files' names say"
    )
    any_size: bool = Field(False, description="take files of other sizes than the papers' too, such as a subset")
    split_seed: int = Field(0, description="seed of the validation pairs where the files have no such part")


@dataclass(frozen=True)
class Benchmark:
    """A data set: what folders of it are called, its classes, and how many pairs of each part the papers have."""

    name: str
    folders: tuple[str, ...]
    classes: int
    train: int
    validation: int
    test: int
    source: str = "nobody publishes its features, so ask the authors, or make them and save them under these names"

    @property
    def held(self) -> list[int]:
        """How many pairs there are outside training: those for test, with or without those for validation."""
        return sorted({self.test, self.validation + self.test})


_PASCAL = (
    "the files are in FedCMR/data/Pascal of https://github.com/hasakiXie123/FedCMR and in data/pascal of "
    "https://github.com/penghu-cs/DSCMR"
)
PASCAL = Benchmark("pascal-vgg", ("pascal-vgg", "Pascal", "pascal"), 20, 800, 100, 100, _PASCAL)
WIKIPEDIA = Benchmark("wikipedia-vgg", ("wikipedia-vgg", "Wikipedia", "wikipedia", "wiki"), 10, 2173, 231, 462)
NUS_WIDE_10K = Benchmark("nus-wide-10k", ("nus-wide-10k", "NUS-WIDE-10K", "nuswide"), 10, 8000, 1000, 1000)
MIRFLICKR = Benchmark("mirflickr", ("mirflickr", "MIR-Flickr25K", "MIRFlickr-25K"), 24, 16012, 2001, 2002)
COCO = Benchmark("coco", ("coco", "MS-COCO"), 80, 82081, 10000, 30137)
XMEDIANET = Benchmark("xmedianet", ("xmedianet", "XMediaNet"), 200, 32000, 4000, 4000)
CUB = Benchmark("cub", ("cub", "CUB"), 200, 5994, 0, 5794)


class File(NamedTuple):
    """A file's path below the folder, and the variable that is read from it."""

    path: str
    variable: str


class Files(NamedTuple):
    """The files of one part; those of text labels are there or not."""

    image: File
    text: File
    labels: File
    text_labels: File | None = None


@dataclass(frozen=True)
class Layout:
    """Where authors keep the pairs; without files for `held`, those not for training, all are in those of `train`.

    first: what their code counts classes from. ordered: whether the order of the held rows says what they are for.
    """

    name: str
    train: Files
    held: Files | None
    first: int
    ordered: bool

    @property
    def needed(self) -> list[str]:
        """The paths of the files that must be there."""
        return [file.path for part in (self.train, self.held) if part for file in part[:3]]


def _fedcmr(pattern: str) -> Files:
    image, text, labels = (pattern.format(what) for what in ("imgs", "texts", "labels"))
    return Files(File(image, "features"), File(text, "features"), File(labels, "labels"))


def _dscmr(part: str) -> Files:
    return Files(*(File(f"{part}_{what}.mat", f"{part}_{what}") for what in ("img", "txt", "img_lab", "txt_lab")))


LAYOUTS = (
    Layout("fedcmr", _fedcmr("{}.mat"), None, first=1, ordered=True),
    Layout("fedcmr", _fedcmr("{}_shuffled.mat"), None, first=1, ordered=True),
    Layout("fedcmr", _fedcmr("train/train_{}.mat"), _fedcmr("test/test_{}.mat"), first=1, ordered=True),
    Layout("dscmr", _dscmr("train"), _dscmr("test"), first=0, ordered=False),
)
EXPECTED = {
    "fedcmr": "imgs.mat, texts.mat and labels.mat, or imgs_shuffled.mat ..., or train/train_imgs.mat ... and "
    "test/test_imgs.mat ...",
    "dscmr": "train_img.mat, train_txt.mat and train_img_lab.mat, and the same of test",
}


def load(benchmark: Benchmark, options: Options, data_dir: Path | None = None) -> Dataset:
    """The pairs as "image" and "text". Raises InputError for files that are missing, malformed or of other sizes."""
    folder, layout = _find(benchmark, options, data_dir)
    train, held = _read(folder, layout, benchmark)
    published = len(train) == benchmark.train and len(held) in benchmark.held
    got = f"{len(train)} training and {len(held)} further pairs"
    if not published and (not options.any_size or len(train) < 2 or not len(held)):
        raise InputError(
            f"{folder}: expected {benchmark.train} training and {' or '.join(map(str, benchmark.held))} further pairs, "
            f"got {got}" + ("" if options.any_size else "; dataset.any_size=true takes them nevertheless")
        )
    if published and (there := int(train.labels.any(0).sum())) < benchmark.classes:
        raise InputError(f"{folder}: expected training pairs of all {benchmark.classes} classes, got them of {there}")
    parts = _divide(train, held, len(held) - benchmark.test if published else 0, layout, options.split_seed)
    notes = [
        f"files in the layout of {layout.name}'s authors; they do not say which encoders made the features, and "
        "encoders fine-tuned on the training pairs, as DRSL's and MCCN's are, put labels into features",
        parts.division,
    ]
    if not published:
        notes.append(f"{got}, not the papers' sizes")
    return Dataset(
        name=benchmark.name,
        spec=DataSpec({modality: x.shape[1] for modality, x in train.features.items()}, benchmark.classes),
        classes=tuple(str(c) for c in range(benchmark.classes)),
        train=parts.train,
        validation=parts.validation,
        test=parts.test,
        all_test=parts.all_test,
        all_test_overlaps=parts.all_test is not parts.test,
        scaling={"image": "standardise", "text": "standardise"},
        notes=tuple(f"{benchmark.name}: {note}" for note in notes),
    )


def _find(benchmark: Benchmark, options: Options, data_dir: Path | None) -> tuple[Path, Layout]:
    """The first place with files of a layout, and that layout. Raises InputError for none, several or a part of one."""
    wanted = [layout for layout in LAYOUTS if options.layout in ("auto", layout.name)]
    looked_in = places(benchmark.folders, data_dir)
    for folder in looked_in:
        found = [layout for layout in wanted if any((folder / path).is_file() for path in layout.needed)]
        if len(found) > 1:
            names = " and ".join(f"some of {', '.join(layout.needed)} ({layout.name})" for layout in found)
            raise InputError(f"{folder}: expected the files of one layout, got {names}; dataset.layout chooses authors")
        for layout in found:
            if missing := [path for path in layout.needed if not (folder / path).is_file()]:
                raise InputError(f"{folder}: expected {', '.join(layout.needed)}, got no {', '.join(missing)}")
            return folder, layout
    files = ", or ".join(f"{EXPECTED[name]} (layout {name})" for name in sorted({layout.name for layout in wanted}))
    raise not_found(benchmark.name, looked_in, files, benchmark.source)


def _read(folder: Path, layout: Layout, benchmark: Benchmark) -> tuple[Items, Items]:
    """The pairs for training and all the others, in the files' order."""
    parts = [part for part in (layout.train, layout.held) if part]
    raw = {}
    for file in (file for part in parts for file in part[2:] if file and (folder / file.path).is_file()):
        raw[file.path] = read(folder / file.path, [file.variable])[file.variable]
    found = labelled({str(folder / path): x for path, x in raw.items()}, benchmark.classes, layout.first)
    labels = dict(zip(raw, found, strict=True))
    items = [_pairs(folder, part, labels) for part in parts]
    widths = [{modality: x.shape[1] for modality, x in part.features.items()} for part in items]
    if widths[0] != widths[-1]:
        raise InputError(f"{folder}: expected equal widths in training and test, got {widths[0]} and {widths[-1]}")
    if layout.held:
        return items[0], items[1]
    rows = len(items[0])
    whole = benchmark.train + benchmark.test
    cut = benchmark.train if rows - benchmark.train in benchmark.held else rows * benchmark.train // whole
    return _rows(items[0], 0, cut), _rows(items[0], cut, rows)


def _pairs(folder: Path, part: Files, labels: Mapping[str, Tensor]) -> Items:
    """The pairs of one part. Raises InputError where its files differ in rows, or images and texts in labels."""
    own = labels[part.labels.path]
    features = {}
    for modality, file in (("image", part.image), ("text", part.text)):
        features[modality] = x = read(folder / file.path, [file.variable])[file.variable]
        if len(x) != len(own):
            raise InputError(
                f"{folder / file.path}: expected {len(own)} rows, one per label of {part.labels.path}, got {len(x)}"
            )
    of_text = labels.get(part.text_labels.path, own) if part.text_labels else own
    if not of_text.equal(own):
        raise InputError(f"{folder}: expected the same labels in {part.labels.path} and its texts', got others")
    return Items.paired(features, own)


class _Parts(NamedTuple):
    train: Items
    validation: Items
    test: Items
    all_test: Items
    division: str


def _divide(train: Items, held: Items, extra: int, layout: Layout, seed: int) -> _Parts:
    """The parts of a data set, of whose pairs outside training `extra` are for validation."""
    rng = generator(seed, "image-text validation")
    if not extra:
        tenth = max(1, len(train) // 10)
        drawn, rest = _draw(train.labels, (tenth, len(train) - tenth), rng)
        said = f"the files have no validation pairs: {tenth} of {len(train)} training pairs are, drawn by seed {seed}"
        return _Parts(train.select(rest), train.select(drawn), held, held, said)
    if layout.ordered:
        test = _rows(held, extra, len(held))
        said = f"of the pairs outside training the first {extra} are for validation, the last {len(test)} for test"
        return _Parts(train, _rows(held, 0, extra), test, test, said)
    drawn, rest = _draw(held.labels, (extra, len(held) - extra), rng)
    sizes = f"{extra} validation and {len(rest)} test pairs"
    said = f"the {len(held)} pairs of the test files are divided into {sizes} by seed {seed}"
    return _Parts(train, held.select(drawn), held.select(rest), held, said)


def _draw(labels: Tensor, sizes: tuple[int, int], rng: Generator) -> list[Tensor]:
    """Parts in which every class has its share."""
    single = bool((labels.sum(1) == 1).all())
    return stratified(labels.int().argmax(1), sizes, rng) if single else stratified_labels(labels, sizes, rng)


def _rows(items: Items, start: int, end: int) -> Items:
    """Some consecutive pairs, in the memory of the whole."""
    return Items.paired({m: x[start:end] for m, x in items.features.items()}, items.labels[start:end])
