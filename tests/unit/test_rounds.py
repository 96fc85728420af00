"""A client's side of a round against plain arithmetic: what W_0 is of a learner that starts at its first data."""

from __future__ import annotations

import pytest
import torch

from fedxmr.messages import Task
from fedxmr.rounds import Client
from fedxmr.scaling import Scaler
from fedxmr.seeding import generator
from fedxmr.setting import Setting
from fedxmr.snapshot import Owner
from fedxmr.sources import dataset, parts
from tests.federations import SMALL, configured

STILL = (
    "learner.name=mccn",
    *SMALL,
    "learner.optimizer.lr=1e-30",
    "dataset.scaling={image: none, text: none}",
)
"""No step moves anything: whatever changes in a round is where prototypes start."""


pytestmark = pytest.mark.usefixtures("one_thread")


def first_round(*assignments):
    """A client that has taken part in round 1, its items, the initial shared state, and its update."""
    config = configured(*assignments, base=STILL)
    data = dataset(config)
    setting, items = Setting(config, data), parts(config)[0].take(data.train)
    client = Client(setting, lambda: items, Owner(0, "ab"))
    initial = {name: setting.initial[name] for name in setting.shared}
    return client, items, setting.initial, client.take_part(Task(1, 0, 0, initial, scaler=Scaler({}, {})))


def class_means(items, w):
    """Class by class, the mean of the items' embeddings of both modalities, scaled to length 1."""
    sums, counts = torch.zeros(3, 4), torch.zeros(3)
    for m in ("image", "text"):
        for x, labels in zip(items.features[m], items.labels, strict=True):
            hidden = (w[f"towers.{m}.weight"] @ x + w[f"towers.{m}.bias"]).clamp(min=0)
            embedding = (w["common.weight"] @ hidden + w["common.bias"]).clamp(min=0)
            (c,) = labels.nonzero()
            sums[c] += embedding / embedding.norm() if embedding.any() else 0
            counts[c] += 1
    return sums / counts[:, None]


@pytest.mark.parametrize("strategy", ["fedcmr", "fedavg"])
def test_prototypes_start_from_all_items_also_those_held_back(strategy):
    # one item is in the joint stage: by itself it would start one class, and average two others in as zeros
    _, items, initial, update = first_round(f"strategy={strategy}", "strategy.joint_fraction=0.05")
    assert (items.labels.sum(0) > 1).all()
    torch.testing.assert_close(update.shared["prototypes"], class_means(items, initial))


def test_where_prototypes_start_is_no_change_of_the_clients_in_equation_6():
    client, _, _, update = first_round("strategy.gamma=7")
    g = generator(0, "received")
    received = {name: torch.rand(t.shape, generator=g) for name, t in update.shared.items()}
    client.take_part(Task(2, 0, 1, received, fit=False))
    # W_1 + gamma (W_1^k - W_0^k), and nothing has moved since the start
    for name, t in received.items():
        torch.testing.assert_close(client.learner.state()[name], t)
