"""MvDA: multi-view discriminant analysis (Kan, Shan, Zhang, Lao and Chen, ECCV 2012; TPAMI 2016), closed form.

Every row of every modality is a sample of its item's class; one projection for each modality takes them all to a
common space, where the scatter S_B of the classes' means is to be large against the scatter S_W about them:

    maximise w^T S_B w    subject to    w^T (S_W + ridge) w = 1,    w the projections of all modalities stacked

The ridge of a modality is that part of the mean over its columns of their total scatter. There are as many axes as
classes, less one.

No item needs more than one modality, and any number of modalities will do. Decided here, where the paper says nothing:
- an item of several classes is a sample of each of them, and one of no class is none;
- each modality is centred on its samples' mean, so that where a modality lies is no difference between classes;
- solved in the principal axes of each modality's total scatter, so constant columns and fewer items than columns do no
  harm. Directions along which classes do not vary at all then have the ridge alone against them: with a ridge of 0
  their weight is that of a scatter of 1e-10.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from fedxmr.learners.projection import Affine, ProjectionLearner, View, leading
from fedxmr.types import DataSpec, Items


class MvDAConfig(BaseModel):
    """MvDA's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    components: int | None = Field(
        None, ge=1, le=1 << 20, description="axes of the common space; null: all, one less than there are classes"
    )
    ridge: float = Field(0.01, ge=0, description="added to the scatter, as a part of the modality's mean scatter")


class MvDA(ProjectionLearner):
    """The learner of any number of modalities, with labels."""

    Config = MvDAConfig

    def __init__(self, config: MvDAConfig, spec: DataSpec, device: torch.device, rng: Generator | None) -> None:
        self._axes = config.components or max(spec.num_classes - 1, 1)
        super().__init__(self._axes, spec, device, rng)
        self._ridge = config.ridge

    def _solve(self, data: Items) -> tuple[Mapping[str, Affine], float] | None:
        """The loss: the mean over axes of the part of the scatter, ridge included, that is within classes."""
        samples, views = {}, {}
        for modality in data.modalities:
            item, of = data.labels[data.rows[modality]].nonzero().T
            if len(item):
                samples[modality] = F.one_hot(of, data.labels.shape[1]).double()
                views[modality] = View.of(data.features[modality][item])
        if not views:
            return None
        axes, between = discriminate(samples, views, self._ridge)
        found = leading(axes, between, self._axes, views)
        return (found[0], max(1 - float(found[1].mean()), 0.0)) if found else None


def discriminate(
    samples: Mapping[str, Tensor], views: Mapping[str, View], ridge: float
) -> tuple[dict[str, Tensor], Tensor]:
    """All axes that tell classes apart, modality -> [d, r], and the part of their scatter between classes, [r].

    samples: modality -> [n_m, C] float64, the class of each of the view's rows as 1.
    """
    # scatters are n times covariances
    bases = {m: view.whitener(ridge) * len(view.x) ** -0.5 for m, view in views.items()}
    sizes = torch.stack([of.sum(0) for of in samples.values()]).sum(0).clamp(min=1)
    sums = torch.cat([(views[m].x @ basis).T @ samples[m] for m, basis in bases.items()])
    vectors, singular, _ = torch.linalg.svd(sums * sizes.rsqrt(), full_matrices=False)
    between = singular.square().clamp(max=1)
    # so far an axis has w^T (S_W + S_B + ridge) w = 1; S_W + ridge is what is to be 1
    vectors = vectors * (1 - between).clamp(min=1e-10).rsqrt()
    parts = torch.split(vectors, [basis.shape[1] for basis in bases.values()])
    return {m: basis @ part for (m, basis), part in zip(bases.items(), parts, strict=True)}, between
