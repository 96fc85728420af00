"""What leaves a client's machine and what does not, for whoever must answer for it; from a resolved configuration.

tests/integration/test_disclosure.py compares it with what clients send. Whatever is computed from data says something
about them, shared parameters too: nothing is added here that would hide it (differential privacy, secure aggregation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedxmr.config import Config
from fedxmr.data import Dataset
from fedxmr.scaling import BY_MOMENTS
from fedxmr.setting import build_learner, owned_names
from fedxmr.sources import scaling
from fedxmr.state import size
from fedxmr.strategies import shared_names
from fedxmr.types import State


@dataclass(frozen=True)
class Disclosure:
    """What a client of a run sends, of its data and of its model.

    moments: modality -> width, where mean and centred sum of squares of its columns are sent.
    class_vectors: whether the vectors of the classes are. shared: what is sent of the model in every round, by name;
    private: what of the model never is.
    """

    modalities: tuple[str, ...]
    moments: dict[str, int]
    class_vectors: bool
    shared: State
    private: State


def disclosure(config: Config, data: Dataset) -> Disclosure:
    """What a client with these data sends. Raises InputError where learner, strategy and data do not go together."""
    held = data.train.modalities
    learner = build_learner(config.learner, data.spec, torch.device("cpu"), torch.Generator().manual_seed(0))
    model = learner.state(learner.trainable | learner.statistics)
    sent = owned_names(shared_names(config.strategy, learner), learner, held)
    how = scaling(config, data)
    return Disclosure(
        modalities=tuple(data.spec.dims),
        moments={m: data.spec.dims[m] for m in held if how[m] in BY_MOMENTS},
        class_vectors=data.spec.class_vectors is not None,
        shared={name: model[name] for name in sorted(sent)},
        private={name: model[name] for name in sorted(model.keys() - sent)},
    )


def describe(config: Config, found: Disclosure) -> Iterator[str]:
    """The same for a reader, line by line."""
    every = config.evaluation.every
    yield f"What leaves a client's machine, with {config.strategy.name} and {config.learner.name}"
    yield ""
    yield "Once, at the start:"
    yield "  its client id, the versions of fedxmr, torch and flwr, the hash of the model that all start from"
    yield "  how many training items it has, how many of each class, how many in each modality"
    yield f"  its modalities ({', '.join(found.modalities)}), how wide they are, and how many classes there are"
    for modality, width in found.moments.items():
        yield f"  of {modality}: the mean, and the sum of squares about it, of each of its {width} columns"
    if found.class_vectors:
        yield "  the vectors of the classes (class_vectors.npy), in which it agrees with all others"
    yield "In every round that it takes part in, or is measured in:"
    yield "  the loss of its training, how many training items it has and how many of each class, seconds of work"
    if every:
        often = "" if every == 1 else f", every {every} rounds and after the last"
        yield f"  mAP of its model on its validation items, by direction{often}"
        if config.evaluation.protocol == "paper":
            yield "  mAP of its model on its test items, as often"
    yield from _listed(found.shared) if found.shared else ["  nothing of its model"]
    yield "At the end:"
    yield "  mAP of its selected and its last model on its test items, and the hash of its last model"
    yield "When something goes wrong:"
    yield "  the words of the error; they may name a file of the client's and quote what is wrong in it"
    yield "Besides, to Flower's server: its network address, its public key, when it is there, how long it worked"
    yield ""
    yield "What never leaves it: features and labels of any item, what is encoded from them, the optimiser's state,"
    share = size(found.shared) / (size(found.shared) + size(found.private))
    if not found.private:
        yield "but of its model all is sent."
        return
    yield f"and {1 - share:.0%} of its model:"
    yield from _listed(found.private)


def _listed(state: State) -> Iterator[str]:
    for name, tensor in state.items():
        yield f"  {name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
