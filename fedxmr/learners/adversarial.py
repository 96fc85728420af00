"""Adversaries of JFSE: Wasserstein critics of features, and a discriminator of modalities behind a gradient reversal.

Wasserstein GAN with gradient penalty: Gulrajani et al., NeurIPS 2017; conditional on class vectors: JFSE, eq. 1-3.
Gradient reversal: Ganin and Lempitsky, ICML 2015; JFSE, eq. 14.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fedxmr.learners.training import linear

SLOPE = 0.2
"""Of the leaky ReLUs: TensorFlow's default, which JFSE's authors used."""


class Critic(NamedTuple):
    """A critic's parameters: D(x, c) = value . leaky_relu(features x + classes c + bias).

    features [h, d] and classes [h, s], together one layer on [x; c], which apart need not be joined nor divided;
    bias [h], value [1, h].
    """

    features: Tensor
    classes: Tensor
    bias: Tensor
    value: Tensor

    @classmethod
    def drawn(cls, d: int, s: int, hidden: int, rng: Generator | None, device: torch.device) -> Critic:
        """A critic as two layers of torch.nn.Linear would start."""
        weight, bias = linear(d + s, hidden, rng, device)
        value, _ = linear(hidden, 1, rng, device)
        features, classes = torch.split(weight, [d, s], dim=1)
        return cls(features.contiguous(), classes.contiguous(), bias, value)

    def __call__(self, x: Tensor, c: Tensor) -> Tensor:
        """[n, d] features and [n, s] class vectors -> [n]."""
        hidden = F.linear(x, self.features) + F.linear(c, self.classes, self.bias)
        return F.linear(F.leaky_relu(hidden, SLOPE), self.value)[:, 0]

    def frozen(self) -> Critic:
        """The same critic, into which no gradient flows."""
        return Critic(*(parameter.detach() for parameter in self))


def critic_loss(critic: Critic, real: Tensor, synthetic: Tensor, c: Tensor, mix: Tensor, penalty: float) -> Tensor:
    """The negative of eq. 1: E D(x~, c) - E D(x, c) + penalty E(||grad D(x^, c)||_2 - 1)^2, x^ = a x + (1 - a) x~.

    real, synthetic [n, d], c [n, s]; mix [n, 1] in [0, 1]: a. The gradient is with respect to the features alone.
    """
    n = len(real)
    between = mix * real + (1 - mix) * synthetic
    of_classes = F.linear(c, critic.classes, critic.bias).repeat(3, 1)
    hidden = F.linear(torch.cat([real, synthetic, between]), critic.features) + of_classes
    values = F.linear(F.leaky_relu(hidden[: 2 * n], SLOPE), critic.value)
    slope = torch.where(hidden[2 * n :] > 0, critic.value, SLOPE * critic.value) @ critic.features
    norm = (slope.square().sum(1) + 1e-12).sqrt()
    return values[n:].mean() - values[:n].mean() + penalty * (norm - 1).square().mean()


def modality_loss(logits: Sequence[Tensor], modalities: Sequence[int]) -> Tensor:
    """Eq. 14 for one set of embeddings: the sum over modalities of the mean cross entropy of telling them.

    logits: per modality [n_m, M - 1], those of modalities 1, 2 ...; modality 0 has logit 0. modalities: their numbers.
    """
    terms = [
        -torch.log_softmax(F.pad(logit, (1, 0)), dim=1)[:, modality].mean()
        for logit, modality in zip(logits, modalities, strict=True)
    ]
    return torch.stack(terms).sum()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, but the gradient that flows back through it comes times `factor`; -1 is the gradient reversal."""
    if not x.requires_grad:
        return x
    scaled = x.view_as(x)
    scaled.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
    return scaled
