"""A user's own folder: what it may hold, and one line for each way it can be wrong."""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedxmr.config import resolve
from fedxmr.data import folder as folder_module
from fedxmr.data import load_dataset
from fedxmr.data.looks import thumbnail
from fedxmr.errors import InputError
from fedxmr.sources import parts
from fedxmr.types import Items

N = 12
CLASSES = np.arange(N) % 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve items of three classes, seen through two complete modalities."""
    made = tmp_path / "mine"
    (made / "features").mkdir(parents=True)
    (made / "rows").mkdir()
    rng = np.random.default_rng(0)
    np.save(made / "features" / "image.npy", rng.normal(size=(N, 4)))
    np.save(made / "features" / "text.npy", rng.integers(9, size=(N, 3)))
    np.save(made / "labels.npy", CLASSES)
    save_split(made)
    return made


def save_split(folder: Path, **parts: object) -> None:
    given = {"train": np.arange(6), "validation": np.arange(6, 9), "test": np.arange(9, 12)}
    np.savez(folder / "split.npz", **{name: np.asarray(index) for name, index in (given | parts).items()})


def message(folder: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_dataset(str(folder), options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_features_and_labels_arrive_as_they_were_given(folder: Path):
    dataset = load_dataset(str(folder))
    assert dataset.name == "mine"
    assert dataset.classes == ("0", "1", "2")
    assert dataset.spec.dims == {"image": 4, "text": 3}
    assert dataset.scaling == {"image": "standardise", "text": "standardise"}
    image, text = (np.load(folder / "features" / f"{m}.npy") for m in ("image", "text"))
    for part, index in ((dataset.train, range(6)), (dataset.validation, range(6, 9)), (dataset.test, range(9, 12))):
        assert torch.equal(part.features["image"], torch.tensor(image[list(index)], dtype=torch.float32))
        assert torch.equal(part.features["text"], torch.tensor(text[list(index)], dtype=torch.float32))
        assert part.labels.int().argmax(1).tolist() == [i % 3 for i in index]
    assert dataset.all_test is dataset.test
    assert not dataset.all_test_overlaps


def test_an_item_may_lack_a_modality(folder: Path):
    lacking = [1, 7, 10]
    rows = np.array([i for i in range(N) if i not in lacking], dtype=np.uint16)
    np.save(folder / "features" / "text.npy", rows[:, None] * np.ones((1, 3), dtype=np.float16))
    np.save(folder / "rows" / "text.npy", rows)
    dataset = load_dataset(str(folder))
    assert dataset.train.rows["text"].tolist() == [0, 2, 3, 4, 5]
    assert dataset.train.features["text"][:, 0].tolist() == [0, 2, 3, 4, 5]
    assert dataset.test.rows["text"].tolist() == [0, 2]
    assert dataset.test.features["text"][:, 0].tolist() == [9, 11]
    assert dataset.test.rows["image"].tolist() == [0, 1, 2]


def test_labels_may_be_multi_hot(folder: Path):
    labels = np.random.default_rng(1).random((N, 5)) < 0.4
    for stored in (labels, labels.astype(np.int8), labels.astype(np.float64)):
        np.save(folder / "labels.npy", stored)
        assert torch.equal(load_dataset(str(folder)).train.labels, torch.tensor(labels[:6]))


def test_class_names_may_name_classes_no_item_has(folder: Path):
    (folder / "classes.txt").write_text("cat\nguinea pig\nox\nunseen\n")
    dataset = load_dataset(str(folder))
    assert dataset.classes == ("cat", "guinea pig", "ox", "unseen")
    assert dataset.train.labels.shape == (6, 4)


def test_class_vectors_are_handed_on(folder: Path):
    np.save(folder / "class_vectors.npy", np.eye(3))
    dataset = load_dataset(str(folder))
    assert torch.equal(dataset.spec.class_vectors, torch.eye(3))


def test_the_recommended_scaling_is_what_the_file_says_and_standardise_where_it_says_nothing(folder: Path):
    (folder / "scaling.json").write_text('{"text": "norm"}')
    assert load_dataset(str(folder)).scaling == {"image": "standardise", "text": "norm"}


def test_training_items_may_lack_a_modality_altogether(folder: Path):
    np.save(folder / "features" / "text.npy", np.ones((6, 3)))
    np.save(folder / "rows" / "text.npy", np.arange(6, 12))
    dataset = load_dataset(str(folder))
    assert dataset.train.modalities == ("image",)
    assert dataset.train.features["text"].shape == (0, 3)
    assert dataset.spec.dims == {"image": 4, "text": 3}
    with pytest.raises(InputError, match=r"mine: expected training items that have text, got none; [^\n]*$"):
        parts(resolve({"dataset": str(folder)}))


def test_hidden_files_are_passed_over(folder: Path):
    (folder / "features" / ".DS_Store").write_bytes(b"x")
    assert load_dataset(str(folder)).spec.dims == {"image": 4, "text": 3}


def test_the_example_in_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    example = folder_module.__doc__.split("`--dataset my-data/`:\n")[1].split("Features are given raw")[0]
    exec(textwrap.dedent(example), {})
    dataset = load_dataset("my-data/")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [200, 40, 60]
    assert dataset.name == "my-data"


def save(name: str, array: object) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, np.asarray(array))


def split(**parts: object) -> Callable[[Path], None]:
    return lambda folder: save_split(folder, **parts)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def with_value(value: float, dtype: type = np.float64) -> np.ndarray:
    features = np.ones((N, 4), dtype=dtype)
    features[5, 2] = features[7, 0] = value
    return features


def rows_of_nine(rows: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        np.save(folder / "features" / "text.npy", np.ones((9, 3)))
        np.save(folder / "rows" / "text.npy", np.asarray(rows))

    return damage


MISTAKES = [
    (remove("labels.npy"), "labels.npy: expected a .npy array, got nothing there"),
    (remove("split.npz"), "split.npz: expected an archive of train, validation, test, got nothing there"),
    (remove("features/text.npy"), "features: expected two modalities or more, got ['image']"),
    (write("features/notes.csv", b"1,2"), "features/notes.csv: expected <modality>.npy"),
    (save("features/a.b.npy", np.ones((N, 2))), "features/a.b.npy: expected <modality>.npy, the modality in letters"),
    (save("features/text.npy", [None] * N), "features/text.npy: expected a .npy array without Python objects, got "),
    (write("features/text.npy", b""), "features/text.npy: expected a .npy array without Python objects, got "),
    (write("features/text.npy", b"1 2 3\n" * 50), "features/text.npy: expected a .npy array without Python objects"),
    (cut("features/text.npy", 60), "features/text.npy: expected a .npy array without Python objects, got "),
    (cut("features/text.npy", 200), "features/text.npy: expected a .npy array without Python objects, got "),
    (save("features/text.npy", np.ones(N)), "features/text.npy: expected [n, d] numbers, got [12] float64"),
    (save("features/text.npy", np.ones((N, 2, 2))), "expected [n, d] numbers, got [12, 2, 2] float64"),
    (save("features/text.npy", np.ones((N, 0))), "expected [n, d] numbers, got [12, 0] float64"),
    (save("features/text.npy", np.ones((0, 3))), "expected [n, d] numbers, got [0, 3] float64"),
    (save("features/text.npy", [["a", "b"]] * N), "expected [n, d] numbers, got [12, 2] <U1"),
    (save("features/text.npy", np.ones((N, 3), dtype=complex)), "expected [n, d] numbers, got [12, 3] complex128"),
    (save("features/image.npy", with_value(np.nan)), "features/image.npy: expected finite float32 numbers, got NaN or "
     "infinite ones, or such above 1e+18, first in row 5"),
    (save("features/image.npy", with_value(-np.inf, np.float32)), "features/image.npy: expected finite "),
    (save("features/image.npy", with_value(1e19)), "features/image.npy: expected finite float32 numbers"),
    (save("features/image.npy", with_value(1e300)), "features/image.npy: expected finite float32 numbers"),
    (save("features/text.npy", np.ones((11, 3))), "features/text.npy: expected 12 rows, one per label, got 11; "
     "a modality that some items lack needs rows/text.npy"),
    (save("labels.npy", CLASSES[:11]), "features/image.npy: expected 11 rows, one per label, got 12"),
    (save("labels.npy", CLASSES - 1), "labels.npy: expected classes from 0, got -1 for item 0"),
    (save("labels.npy", CLASSES * 1000), "labels.npy: expected classes numbered from 0 without gaps, got 2000"),
    (save("labels.npy", CLASSES / 2), "labels.npy: expected [n] integer classes or [n, C] of 0 and 1, got [12] f"),
    (save("labels.npy", CLASSES > 0), "labels.npy: expected [n] integer classes or [n, C] of 0 and 1, got [12] bool"),
    (save("labels.npy", CLASSES[:, None]), "labels.npy: expected 0 and 1 only, got 2 for item 2"),
    (save("labels.npy", np.full((N, 2), np.nan)), "labels.npy: expected 0 and 1 only, got nan for item 0"),
    (save("labels.npy", np.zeros(0, dtype=int)), "labels.npy: expected [n] integer classes or [n, C]"),
    (write("classes.txt", b"cat\ndog\n"), "classes.txt: expected 3 names or more, got 2"),
    (write("classes.txt", b"cat\n\ndog\n"), "classes.txt: expected one name per line, all different, got ''"),
    (write("classes.txt", b"cat\ndog\ncat\n"), "classes.txt: expected one name per line, all different, got 'cat'"),
    (write("classes.txt", b"\n"), "classes.txt: expected one name per line, got an empty file"),
    (write("classes.txt", b"\xff\xfe"), "classes.txt: expected UTF-8 text, got "),
    (save("class_vectors.npy", np.ones((4, 2))), "class_vectors.npy: expected [3, k], one row per class, got [4, 2]"),
    (save("class_vectors.npy", np.eye(3)[[0, 1, 0]]), "class_vectors.npy: expected vectors that tell classes apart"),
    (save("class_vectors.npy", np.eye(3)[:, :2]), "class_vectors.npy: expected vectors that tell classes apart"),
    (save("class_vectors.npy", np.full((3, 2), np.nan)), "class_vectors.npy: expected finite float32 numbers"),
    (write("scaling.json", b'{"image": "normal"}'), "scaling.json: expected image to be standardise, isotropic, norm, "
     "none, got 'normal'"),
    (write("scaling.json", b'{"image": ["norm"]}'), "scaling.json: expected image to be standardise, isotropic, norm, "
     "none, got ['norm']"),
    (write("scaling.json", b'{"imgae": "norm"}'), "scaling.json 'imgae'; did you mean 'image'? (known: image, text)"),
    (write("scaling.json", b'["norm"]'), "scaling.json: expected a JSON object, such as {\"image\": \"norm\"}, got ['"),
    (write("scaling.json", b"image: norm"), "scaling.json: expected a JSON object, such as "),
    (write("scaling.json", b"\xff"), "scaling.json: expected a JSON object, such as "),
    (write("scaling.json", b"[" * 100_000), "scaling.json: expected a JSON object, such as "),
    (save("rows/audio.npy", [0]), "unknown modality in rows/ 'audio' (known: image, text)"),
    (save("rows/text.npy", np.arange(5)), "rows/text.npy: expected [12] integers, one per feature row, got [5] int64"),
    (rows_of_nine(np.arange(9) / 1), "rows/text.npy: expected [9] integers, one per feature row, got [9] float64"),
    (rows_of_nine([0, 1, 2, 4, 3, 5, 6, 7, 9]), "rows/text.npy: expected strictly increasing items, got 4 then 3 at "
     "row 4"),
    (rows_of_nine([0, 1, 2, 2, 3, 5, 6, 7, 9]), "rows/text.npy: expected strictly increasing items, got 2 then 2"),
    (rows_of_nine([0, 1, 2, 3, 4, 5, 6, 7, 12]), "rows/text.npy: expected items from 0 to 11, got 12"),
    (rows_of_nine([-1, 1, 2, 3, 4, 5, 6, 7, 9]), "rows/text.npy: expected items from 0 to 11, got -1"),
    (rows_of_nine(np.arange(9)), "split.npz: expected test items that have text, got none"),
    (split(test=[]), "split.npz: expected test to be item numbers [n], got [0] float64"),
    (split(train=np.zeros(0, dtype=int)), "split.npz: expected train to be item numbers [n], got [0] int64"),
    (split(train=[[1, 2]]), "split.npz: expected train to be item numbers [n], got [1, 2] int64"),
    (split(train=np.ones(N, dtype=bool)), "split.npz: expected train to be item numbers [n], got [12] bool"),
    (split(test=[9, 12]), "split.npz: expected items from 0 to 11, got 12"),
    (split(test=[9, -1]), "split.npz: expected items from 0 to 11, got -1"),
    (split(test=[9, 10, 9]), "split.npz: expected no item twice in test, got item 9 again"),
    (split(test=[9, 5, 4]), "split.npz: expected disjoint parts, got 2 items in both train and test, such as item 4"),
    (split(extra=[1]), "split.npz: expected the arrays train, validation, test, got extra, test, train, validation"),
    (split(train=[None, 1]), "split.npz: expected an .npz archive without Python objects, got "),
    (cut("split.npz", 300), "split.npz: expected an .npz archive without Python objects, got "),
    (write("split.npz", b"no archive"), "split.npz: expected an .npz archive without Python objects, got "),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "expected"), MISTAKES, ids=[expected[:60] for _, expected in MISTAKES])
def test_a_mistake_gets_one_line(damage: Callable[[Path], None], expected: str, folder: Path):
    damage(folder)
    said = message(folder)
    assert said.removeprefix(f"{folder}/").startswith(expected) or expected in said
    assert str(folder) in said or said.startswith("unknown modality")


def test_a_split_without_validation_is_an_error(folder: Path):
    np.savez(folder / "split.npz", train=np.arange(6), test=np.arange(9, 12))
    assert message(folder).endswith("expected the arrays train, validation, test, got test, train")


def test_multi_hot_labels_need_as_many_names_as_columns(folder: Path):
    np.save(folder / "labels.npy", np.ones((N, 4), dtype=bool))
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert message(folder).endswith("classes.txt: expected 4 names, got 3")


def test_no_folder_of_features_is_an_error(folder: Path):
    for path in (folder / "features").iterdir():
        path.unlink()
    (folder / "features").rmdir()
    assert message(folder).endswith("features: expected a folder of <modality>.npy files, got nothing there")


def test_a_file_where_a_folder_is_expected_is_an_error(folder: Path):
    assert re.search("expected a folder, got a file$", message(folder / "labels.npy"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 127), value=st.integers(0, 255), name=st.sampled_from(["features/text.npy", "split.npz"]))
def test_no_damaged_byte_raises_anything_but_an_input_error(folder: Path, at: int, value: int, name: str):
    content = bytearray((folder / name).read_bytes())
    sound = bytes(content)
    content[at] = value
    (folder / name).write_bytes(content)
    try:
        load_dataset(str(folder))
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        (folder / name).write_bytes(sound)


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (400, 100)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def shows(folder: Path, modality: str, *lines: str) -> None:
    (folder / "shown").mkdir(exist_ok=True)
    (folder / "shown" / f"{modality}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def opened(address: str) -> Image.Image:
    head, _, content = address.partition(",")
    assert head in ("data:image/webp;base64", "data:image/png;base64")
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_what_is_shown_of_an_item_is_what_its_line_says(folder: Path):
    lacking = [1, 7, 10]
    rows = np.array([i for i in range(N) if i not in lacking])
    np.save(folder / "features" / "text.npy", np.ones((len(rows), 3)))
    np.save(folder / "rows" / "text.npy", rows)
    save_split(folder, test=[11, 9, 10])
    shows(folder, "text", *(f"text of item {i}" if i != 9 else "" for i in rows))
    shows(folder, "image", *(f"pictures/{i}.PNG" for i in range(N)))
    for i, colour in ((9, "red"), (10, "lime"), (11, "blue")):  # those of training items are not looked for
        picture(folder / "pictures" / f"{i}.PNG", colour)
    looks = load_dataset(str(folder)).looks()
    assert [looks.number("test", i) for i in range(3)] == [11, 9, 10]
    assert [looks.show("test", i, "text").text for i in (0, 1)] == ["text of item 11", ""]
    image = opened(looks.show("test", 0, "image").image)
    assert image.size == (160, 40)
    red, green, blue = image.convert("RGB").getpixel((80, 20))
    assert blue > 240 > 15 > max(red, green)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("gone.png", "line 12: expected an image file in {folder}, got 'gone.png', which is not there"),
        ("../outside.png", "got '../outside.png', which is outside"),
        ("link.png", "got 'link.png', which is outside"),
        ("{folder}/../outside.png", "which is outside"),
        ("text.gif", "text.gif: expected a readable GIF image"),
        ("renamed.jpg", "renamed.jpg: expected a readable JPEG image"),
        ("a\0b.png", "line 12: expected an image file"),
        (f"{'long ' * 100}.png", "line 12: expected an image file"),
        ("one\nmore", "image.txt: expected 12 lines, one per row of the features, got 13"),
    ],
)
def test_what_cannot_be_shown_is_one_line_once_it_is_asked_for(folder: Path, line: str, says: str):
    outside = picture(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "text.gif").write_text("GIF89a, but only by its first letters")
    picture(folder / "x.png").rename(folder / "renamed.jpg")
    shows(folder, "image", *[""] * (N - 1), line.replace("{folder}", str(folder)))
    dataset = load_dataset(str(folder))
    with pytest.raises(InputError) as caught:
        dataset.looks()
    assert says.replace("{folder}", str(folder)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_damaged_further_on_is_one_line(folder: Path):
    whole = picture(folder / "x.png", size=(300, 300)).read_bytes()
    (folder / "x.png").write_bytes(whole[:-60])
    shows(folder, "image", *["x.png"] * N)
    looks = load_dataset(str(folder)).looks()
    with pytest.raises(InputError, match=r"x\.png: expected a readable PNG image, got [^\n]*$"):
        looks.show("test", 0, "image")


def test_shown_is_for_modalities_that_are_there(folder: Path):
    shows(folder, "imgae", *[""] * N)
    with pytest.raises(InputError, match="unknown modality in shown/ 'imgae'; did you mean 'image'"):
        load_dataset(str(folder)).looks()


def test_an_image_of_any_kind_can_be_shown(folder: Path):
    for suffix, mode in ((".png", "RGBA"), (".jpg", "L"), (".jpeg", "CMYK"), (".gif", "P"), (".webp", "RGB")):
        Image.new(mode, (10, 10)).save(folder / f"x{suffix}")
        assert opened(thumbnail(folder / f"x{suffix}")).size == (10, 10)


def test_float32_features_are_mapped_and_consecutive_parts_are_views_of_them(folder: Path):
    rng = np.random.default_rng(0)
    stored = {modality: rng.normal(size=(N, 4)).astype(np.float32) for modality in ("image", "text")}
    for modality, x in stored.items():
        np.save(folder / "features" / f"{modality}.npy", x)
    data = load_dataset(str(folder))
    for modality, x in stored.items():
        found = [getattr(data, part).features[modality] for part in ("train", "validation", "test")]
        assert len({part.untyped_storage().data_ptr() for part in found}) == 1
        np.testing.assert_array_equal(torch.cat(found).numpy(), x)
    data.train.features["image"][0, 0] += 1  # for this process alone
    np.testing.assert_array_equal(np.load(folder / "features" / "image.npy"), stored["image"])


@given(st.data())
def test_a_span_is_what_selecting_gives(data: st.DataObject):
    n = data.draw(st.integers(1, 12))
    rows = {m: torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=torch.int64) for m in "ab"}
    features = {m: torch.randn(len(r), 2) for m, r in rows.items()}
    items = Items(features, rows, torch.eye(n, dtype=torch.bool))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    one, other = items.span(start, stop), items.select(torch.arange(start, stop))
    assert torch.equal(one.labels, other.labels)
    for m in "ab":
        assert torch.equal(one.features[m], other.features[m])
        assert torch.equal(one.rows[m], other.rows[m])
