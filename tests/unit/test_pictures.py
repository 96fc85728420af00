"""A run's pictures: what is drawn, read back from the figures."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fedxmr.evaluation import evaluate_in_full
from fedxmr.metrics import Retrieval
from fedxmr.pictures import common_subspace_figure, precision_scope_figure
from fedxmr.report import SCOPES, scopes
from fedxmr.types import DataSpec, Items
from tests.toy import Toy, ToyConfig

CLASSES = ("art", "biology", "sport")


def some(images: int, texts: int) -> Items:
    """Random items of three classes, of which the first `images` have an image and the last `texts` a text."""
    n = max(images, texts)
    rng = torch.Generator().manual_seed(0)
    features = {"image": torch.randn(images, 4, generator=rng), "text": torch.randn(texts, 3, generator=rng)}
    rows = {"image": torch.arange(images), "text": torch.arange(n - texts, n)}
    return Items(features, rows, torch.eye(3).bool()[torch.arange(n) % 3])


def toy() -> Toy:
    return Toy(ToyConfig(), DataSpec({"image": 4, "text": 3}, 3), torch.device("cpu"), torch.Generator().manual_seed(0))


def found(items: Items) -> Mapping[str, Retrieval]:
    return evaluate_in_full(toy(), items, 0, scopes(items))


def test_scopes_reach_to_the_largest_gallery_and_include_those_of_the_drsl_paper():
    assert scopes(some(12, 30)) == (1, 2, 5, 10, 20, 30)
    assert set(range(10, 81, 10)) | set(range(50, 401, 50)) <= set(SCOPES)
    assert list(SCOPES) == sorted(set(SCOPES))


def test_a_direction_is_drawn_up_to_its_own_gallery():
    items = some(12, 30)
    lines = {line.get_label(): line for line in precision_scope_figure({0: found(items)}).axes[0].lines}
    assert lines["image->text"].get_xdata().tolist() == [1, 2, 5, 10, 20, 30]
    assert lines["text->image"].get_xdata().tolist() == [1, 2, 5, 10]
    # the whole gallery is a third relevant
    assert lines["image->text"].get_ydata()[-1] == pytest.approx(1 / 3)


def test_the_curve_is_the_mean_over_clients():
    one = found(some(30, 30))
    scope = precision_scope_figure({0: one, 4: one}).axes[0].lines[0]
    assert scope.get_ydata().tolist() == list(one["image->text"].precision_at.values())


def test_the_common_subspace_is_shown_by_class_and_by_modality_with_one_legend_each():
    figure = common_subspace_figure(toy(), some(20, 30), CLASSES, 0)
    by_class, by_modality = figure.axes
    assert figure.legends == []
    legends = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [list(CLASSES), ["image", "text"]]
    points = [axes.collections[0].get_offsets() for axes in figure.axes]
    assert points[0].shape == (50, 2)
    assert (points[0] == points[1]).all()
    colours = by_modality.collections[0].get_facecolors()
    assert len({tuple(c) for c in colours[:20]}) == len({tuple(c) for c in colours[20:]}) == 1
    assert tuple(colours[0]) != tuple(colours[20])
    by_kind = by_class.collections[0].get_facecolors()
    assert (by_kind[0] == by_kind[3]).all()
    assert tuple(by_kind[0]) != tuple(by_kind[1])


def test_more_classes_than_colours_are_said_to_be_more():
    items = some(30, 30)
    many = Items(items.features, items.rows, torch.eye(30).bool())
    legend = common_subspace_figure(toy(), many, [str(c) for c in range(30)], 0).axes[0].get_legend()
    assert legend.get_title().get_text() == "class, 20 of 30"
    assert len(legend.get_texts()) == 20
