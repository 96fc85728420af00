"""The pairwise term of DSCMR (Zhen et al., CVPR 2019), which MCCN's ablation "without clustering" also trains with."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedxmr.learners.cosine import unit_rows

Blocks = Literal["unordered", "ordered"]
Similar = Literal["binary", "count"]


def pairwise_loss(
    embeddings: Tensor,
    classes: Tensor,
    modality: Tensor,
    weight: Tensor,
    *,
    blocks: Blocks = "unordered",
    similar: Similar = "binary",
) -> Tensor:
    """l2 of DSCMR: over modality pairs, one with itself too, the mean of log(1 + e^G) - S G -> scalar.

    G is half the cosine of two embeddings, S = [they share a class] or the count of classes they share. embeddings
    [N, k], classes [N, C] 0 or 1. modality [N]: which one each is of. weight [N]: 1 / the number of that modality.
    A pair of two modalities counts once (unordered) or twice.
    """
    unit = unit_rows(embeddings)
    gamma = unit @ unit.T / 2
    target = classes.to(unit.dtype)
    shared = target @ target.T
    s = shared if similar == "count" else shared.clamp(max=1)
    block = torch.outer(weight, weight)
    if blocks == "unordered":
        # all pairs of rows hold a block of two modalities twice, one of a modality with itself once
        block = block * torch.where(modality[:, None] == modality, 1.0, 0.5)
    return ((F.softplus(gamma) - s * gamma) * block).sum()
