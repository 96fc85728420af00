"""Trained models on disk, and `load`, which gives one back ready to encode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedxmr import state
from fedxmr.config import LearnerConfig, read_yaml, resolve
from fedxmr.errors import InputError
from fedxmr.machine import choose_device
from fedxmr.scaling import Scaler, scale
from fedxmr.setting import build_learner
from fedxmr.types import DataSpec, Items, Learner, State


@dataclass(frozen=True)
class Model:
    """A client's trained model, and what it takes to feed it raw features: the spec and the scaling."""

    client: int
    round: int
    weights: State
    spec: DataSpec
    scaler: Scaler
    scaling: Mapping[str, str]


@dataclass(frozen=True)
class Retriever:
    """A trained learner that takes raw features: it scales them as the run did.

    learner: works on scaled features.
    """

    learner: Learner
    dims: Mapping[str, int]
    scaler: Scaler
    scaling: Mapping[str, str]
    client: int
    round: int

    @torch.inference_mode()
    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d_m] raw features -> [n, k] representations in the common subspace; InputError for other shapes."""
        width = self.dims.get(modality)
        if x.ndim != 2 or x.shape[1] != width:
            expected = f"[n, {width}] features" if width else f"one of {', '.join(sorted(self.dims))}"
            raise InputError(f"{modality}: expected {expected}, got {list(x.shape)}")
        items = Items.paired({modality: x.float()}, torch.zeros(len(x), 1, dtype=torch.bool))
        return self.learner.encode(modality, self.scale(items).features[modality])

    def similarity(self, query: Tensor, gallery: Tensor, direction: tuple[str, str]) -> Tensor:
        """Representations [q, k] and [g, k] -> [q, g], higher is closer; direction: (query's, gallery's) modality."""
        return self.learner.similarity(query, gallery, direction)

    def scale(self, items: Items) -> Items:
        """Raw items as the learner sees them."""
        return scale(items, self.scaling, self.scaler)


def save_models(folder: Path, models: Mapping[str, Model]) -> None:
    """Write each model as <folder>/<which>.safetensors."""
    for which, model in models.items():
        tensors = {**state.prefixed("weights", model.weights), **state.prefixed("scaler", model.scaler.to_state())}
        for name in ("class_vectors", "seen"):
            if (tensor := getattr(model.spec, name)) is not None:
                tensors[f"spec/{name}"] = tensor
        about = {
            "client": model.client,
            "round": model.round,
            "dims": dict(model.spec.dims),
            "num_classes": model.spec.num_classes,
            "scaling": dict(model.scaling),
        }
        state.save(folder / f"{which}.safetensors", tensors, about)


def load(
    run: str | Path, client: int = 0, which: Literal["selected", "last"] = "selected", device: str = "cpu"
) -> Retriever:
    """A client's trained model from a run folder, ready to encode raw features.

    which: the model of the round picked on validation, or of the last.
    Raises InputError for a folder, a client or a model that is not there, or a damaged file.
    """
    run = Path(run)
    # the learner alone: the data need not be where they were
    learner = read_yaml(run / "config.yaml").get("learner", {})
    config = resolve({"learner": learner}).learner
    path = run / "clients" / str(client) / f"{which}.safetensors"
    if not path.is_file():
        raise InputError(
            f"{path}: no {which!r} model of client {client}; has the run ended, and did the client take part?"
        )
    tensors, about = state.load(path)
    if about.get("client") != client:
        raise InputError(f"{path}: expected the model of client {client}, got that of {about.get('client')}")
    return _retriever(config, tensors, about, device)


def _retriever(config: LearnerConfig, tensors: State, about: Mapping[str, object], device: str) -> Retriever:
    extra = state.under("spec", tensors)
    spec = DataSpec(about["dims"], about["num_classes"], extra.get("class_vectors"), extra.get("seen"))  # type: ignore[arg-type]
    learner = build_learner(config, spec, choose_device(device), None)
    try:
        learner.load(state.under("weights", tensors))
    except ValueError as error:
        raise InputError(f"the model does not fit the run's config.yaml: {error}") from error
    scaler = Scaler.from_state(state.under("scaler", tensors))
    return Retriever(learner, spec.dims, scaler, about["scaling"], about["client"], about["round"])  # type: ignore[arg-type]
