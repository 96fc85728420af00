"""DSCMR in plain PyTorch, for two modalities that every item has, and mAP: what the programs train and measure."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DSCMR(nn.Module):
    """A private layer for each modality; the subspace and the classifier are common."""

    def __init__(self, image: int, text: int, hidden: int, width: int, classes: int) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({"image": nn.Linear(image, hidden), "text": nn.Linear(text, hidden)})
        self.common = nn.Linear(hidden, width)
        self.classifier = nn.Linear(width, classes)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        """[n, d] -> [n, width]."""
        return F.leaky_relu(self.common(self.towers[modality](x).relu()), 0.01)

    def loss(self, image: Tensor, text: Tensor, classes: Tensor, lambda_: float, eta: float) -> Tensor:
        """DSCMR's objective on a batch of b pairs; classes [b] int64."""
        b = len(classes)
        hidden = torch.cat([self.towers["image"](image).relu(), self.towers["text"](text).relu()])
        common = F.leaky_relu(self.common(hidden), 0.01)
        target = F.one_hot(classes, self.classifier.out_features).to(common.dtype).repeat(2, 1)
        norms = row_norms(self.classifier(common) - target)
        unit = common * common.square().sum(1, keepdim=True).rsqrt()
        gamma = unit @ unit.T / 2
        pairs = F.softplus(gamma) - (target @ target.T) * gamma
        # a block of two modalities stands there twice
        similarity = pairs[:b, :b].mean() + pairs[b:, b:].mean() + pairs[:b, b:].mean()
        distance = row_norms(common[:b] - common[b:]).mean()
        return norms[:b].mean() + norms[b:].mean() + lambda_ * similarity + eta * distance


def row_norms(x: Tensor) -> Tensor:
    """[n, k] -> [n]; differentiable at 0."""
    return (x.square().sum(1) + 1e-12).sqrt()


@torch.inference_mode()
def mean_average_precision(model: DSCMR, image: Tensor, text: Tensor, classes: Tensor) -> float:
    """mAP@all by cosine, the mean of both directions."""
    image, text = (F.normalize(model.encode(name, x)) for name, x in (("image", image), ("text", text)))
    scores = image @ text.T
    relevant = (classes[:, None] == classes).numpy()
    return (_map(scores, relevant) + _map(scores.T, relevant)) / 2


def _map(scores: Tensor, relevant: np.ndarray) -> float:
    bits = (-scores).contiguous().numpy().view(np.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) * 2 + relevant
    keys.sort(axis=1)  # faster than argsort, and what is relevant comes along
    hit = keys & 1
    found = hit.cumsum(1)
    precision = (found / np.arange(1, hit.shape[1] + 1) * hit).sum(1)
    return float((precision / np.maximum(found[:, -1], 1))[found[:, -1] > 0].mean())
