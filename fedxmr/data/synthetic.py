"""Made-up items of any number, width and difficulty, which a neural network can match and a raw cosine cannot.

An item is a point near its classes' centres in a latent space that all modalities see. Each modality adds variation of
its own that says nothing about the class, and passes both through its own random two-layer network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Generator, Tensor

from fedxmr.data.dataset import MODALITY_NAME, Dataset
from fedxmr.seeding import generator
from fedxmr.types import DataSpec, Items

LATENT, PRIVATE, HIDDEN = 16, 16, 64
CHUNK = 16384  # items made at a time, so that float64 work needs little memory beside the result


class Options(BaseModel):
    """Sizes, structure and difficulty."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    items: PositiveInt = Field(1000, description="training items")
    validation_items: PositiveInt = Field(250, description="validation items")
    test_items: PositiveInt = Field(250, description="test items")
    modalities: dict[Annotated[str, Field(pattern=MODALITY_NAME)], PositiveInt] = Field(
        {"image": 64, "text": 32}, description="modality -> feature width", min_length=2
    )
    classes: PositiveInt = Field(10, description="number of classes")
    labels_per_item: PositiveInt = Field(1, description="classes of each item; more than 1 makes it multi-label")
    difficulty: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="spread around the class centres: 0 separable, 2 hard"
    )
    seed: int = Field(0, description="seed of everything drawn")

    @model_validator(mode="after")
    def _enough_classes(self) -> Options:
        if self.labels_per_item > self.classes:
            raise ValueError(f"labels_per_item: expected at most {self.classes} classes, got {self.labels_per_item}")
        return self


def load(options: Options, data_dir: Path | None = None) -> Dataset:  # noqa: ARG001 - all loaders are called alike
    """The data set these options describe: the same bytes for the same options."""
    sizes = (options.items, options.validation_items, options.test_items)
    rng = generator(options.seed, "synthetic items")
    labels = torch.cat([_labels(size, options.classes, options.labels_per_item, rng) for size in sizes])
    centres = torch.randn(options.classes, LATENT, generator=rng, dtype=torch.float64)
    latent = labels.double() @ centres / options.labels_per_item**0.5
    latent += options.difficulty * torch.randn(latent.shape, generator=rng, dtype=torch.float64)
    features = {
        modality: _observe(latent, dim, generator(options.seed, f"synthetic modality {modality}"))
        for modality, dim in options.modalities.items()
    }
    parts = []
    for start, size in zip((0, sizes[0], sum(sizes[:2])), sizes, strict=True):
        rows = slice(start, start + size)
        parts.append(Items.paired({m: x[rows] for m, x in features.items()}, labels[rows]))
    train, validation, test = parts
    return Dataset(
        name="synthetic",
        spec=DataSpec(dict(options.modalities), options.classes),
        classes=tuple(str(c) for c in range(options.classes)),
        train=train,
        validation=validation,
        test=test,
        all_test=test,
        all_test_overlaps=False,
        scaling=dict.fromkeys(options.modalities, "standardise"),
        notes=("synthetic: made-up items, not measurements",),
    )


def _labels(count: int, classes: int, per_item: int, rng: Generator) -> Tensor:
    """[count, classes] bool with `per_item` labels a row; the classes' counts as first labels differ by at most one."""
    first = torch.arange(count)[torch.randperm(count, generator=rng)] % classes
    score = torch.rand(count, classes, generator=rng)
    score[torch.arange(count), first] = 2.0
    return torch.zeros(count, classes, dtype=torch.bool).scatter_(1, score.topk(per_item).indices, True)


def _observe(latent: Tensor, dim: int, rng: Generator) -> Tensor:
    """What one modality sees of latent points [n, LATENT] float64: features [n, dim] float32."""
    first = torch.randn(LATENT + PRIVATE, HIDDEN, generator=rng, dtype=torch.float64) / LATENT**0.5
    second = torch.randn(HIDDEN, dim, generator=rng, dtype=torch.float64) / HIDDEN**0.5
    features = torch.empty(len(latent), dim)
    for start in range(0, len(latent), CHUNK):
        points = latent[start : start + CHUNK]
        private = torch.randn(len(points), PRIVATE, generator=rng, dtype=torch.float64)
        # float64, then rounded: the number of threads must not show in the features
        features[start : start + CHUNK] = torch.tanh(torch.cat([points, private], 1) @ first) @ second
    return features
