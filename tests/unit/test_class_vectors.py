"""Class vectors in fewer dimensions: PCA by another way, what it is fitted on, and what cannot be had."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedxmr.config import resolve
from fedxmr.data import Dataset, load_dataset
from fedxmr.data.class_vectors import with_narrow_class_vectors
from fedxmr.errors import InputError
from fedxmr.seeding import generator
from fedxmr.setting import build_learner

CLASSES = 6


def data(vectors: Tensor | None, named: Tensor | None = None) -> Dataset:
    base = load_dataset("synthetic", {"items": 12, "validation_items": 6, "test_items": 6, "classes": CLASSES})
    return replace(base, spec=replace(base.spec, class_vectors=vectors), named_vectors=named)


def drawn(rows: int, width: int = 9) -> Tensor:
    return torch.randn(rows, width, generator=generator(rows, "vectors")) + 3  # not around zero


def eigenvectors(fitted: Tensor, width: int) -> np.ndarray:
    """[k, width], of the largest eigenvalues of the covariance."""
    values, vectors = np.linalg.eigh(np.cov(fitted.double().numpy().T))
    return vectors[:, values.argsort()[::-1][:width]]


@pytest.mark.parametrize("named", [None, drawn(30)])
def test_narrow_class_vectors_are_coordinates_along_the_axes_of_most_variance(named):
    vectors = drawn(CLASSES)
    fitted = vectors if named is None else named
    reduced = with_narrow_class_vectors(data(vectors, named), 3)
    narrow = reduced.spec.class_vectors
    expected = (vectors.double().numpy() - fitted.double().numpy().mean(0)) @ eigenvectors(fitted, 3)
    assert narrow.dtype == torch.float32
    np.testing.assert_allclose(np.abs(narrow.numpy()), np.abs(expected), atol=1e-5)  # an axis has two directions
    assert reduced.notes[-1].endswith(f"class vectors of 3 dimensions, not 9, by PCA of {len(fitted)} vectors")


def test_as_many_dimensions_as_there_are_keep_every_distance():
    vectors = drawn(CLASSES)
    narrow = with_narrow_class_vectors(data(vectors), CLASSES - 1).spec.class_vectors
    torch.testing.assert_close(torch.pdist(narrow), torch.pdist(vectors))


# two pairs of classes differ along the axis of least variance alone
ALIKE = torch.tensor(
    [[9.0, 0.0, 0.0], [-9.0, 0.0, 0.0], [0.0, 8.0, 1.0], [0.0, 8.0, -1.0], [0.0, -8.0, 1.0], [0.0, -8.0, -1.0]]
)


@pytest.mark.parametrize(
    ("vectors", "named", "width", "says"),
    [
        (None, None, 2, "class vectors to reduce, got synthetic, which has none"),
        (drawn(CLASSES), None, 6, "at most 5, the dimensions that the 6 vectors of synthetic span .* got 6"),
        (drawn(CLASSES), drawn(8), 8, "at most 7, the dimensions that the 8 vectors of synthetic span .* got 8"),
        (drawn(CLASSES), drawn(30), 10, "at most 9, the dimensions that the 30 vectors of synthetic span .* got 10"),
        (ALIKE, None, 2, "tell the classes of synthetic apart, got zeros, or the same vector twice, at 2"),
    ],
)
def test_a_width_that_cannot_be_had_is_refused(vectors, named, width, says):
    with pytest.raises(InputError, match=f"^dataset.class_vector_width: expected .*{says}$"):
        with_narrow_class_vectors(data(vectors, named), width)


def test_jfse_embeds_in_the_space_of_the_narrow_vectors():
    spec = with_narrow_class_vectors(data(drawn(CLASSES)), 4).spec
    config = resolve({"learner": {"name": "jfse", "hidden": 8, "noise": 2}}).learner
    learner = build_learner(config, spec, torch.device("cpu"), generator(0, "initial"))
    for modality, width in spec.dims.items():
        assert learner.encode(modality, torch.zeros(3, width)).shape == (3, 4)
