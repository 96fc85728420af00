"""What a client is said to send is what it sends, and nothing else, with every strategy and learner."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from fedxmr import sources
from fedxmr.disclosure import describe, disclosure
from fedxmr.engines.local import LocalGrid
from tests.federations import SMALL, configured, federate

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = {
    "query.start": {"client", "n", "dims", "num_classes", "held", "moments", "versions", "initial_sha256"},
    "train": {"round", "client", "n", "class_counts", "loss", "validation", "test", "seconds"},
    "query.finish": {"client", "selected", "last", "state_sha256"},
}
"""All that replies say besides arrays, as `describe` tells in words."""

DLSL = tuple(a for a in SMALL if not a.startswith(("learner.hidden", "learner.width")))


@pytest.fixture
def sent(monkeypatch):
    """Kind of message -> (the keys of its facts, the names of its arrays) of all that clients have sent."""
    seen = defaultdict(lambda: (set(), {}))
    exchange = LocalGrid.exchange

    def noting(self, messages, timeout):
        replies = list(exchange(self, messages, timeout))
        for reply in replies:
            facts, arrays = seen[reply.metadata.message_type]
            content = reply.content
            assert set(content) <= {"facts", "arrays"}
            facts.update(json.loads(content.config_records["facts"]["json"]))
            if "arrays" in content:
                arrays.update({name: tuple(array.shape) for name, array in content.array_records["arrays"].items()})
        return replies

    monkeypatch.setattr(LocalGrid, "exchange", noting)
    return seen


@pytest.mark.parametrize(
    ("base", "assignments"),
    [
        (SMALL, ["strategy.name=fedcmr"]),
        (SMALL, ["strategy.name=fedavg"]),
        (SMALL, ["strategy.name=fedprox", "learner.name=mccn"]),
        (SMALL, ["strategy.name=local"]),
        (SMALL, ["strategy.name=fedcmr", "learner.name=drsl"]),
        (SMALL, ["strategy.name=fedcmr", "dataset.scaling={image: none, text: norm}"]),
        (DLSL, ["strategy.name=fedavg", "strategy.share=statistics", "learner.name=dlsl", "learner.width=4"]),
    ],
)
def test_a_client_sends_what_it_is_said_to_send(tmp_path, sent, base, assignments):
    assignments = [*assignments, "federation.checkpoint_every=0"]
    config = configured(*assignments, base=base)
    said = disclosure(config, sources.dataset(config))
    federate(tmp_path / "run", *assignments, base=base)
    assert {kind: facts for kind, (facts, _) in sent.items()} == FACTS
    at_the_start = {"class_counts": (3,)}
    for modality, width in said.moments.items():
        at_the_start |= {f"mean/{modality}": (width,), f"centred/{modality}": (width,)}
    assert sent["query.start"][1] == at_the_start
    assert sent["train"][1] == {name: tuple(tensor.shape) for name, tensor in said.shared.items()}
    assert sent["query.finish"][1] == {}


def test_under_fedcmr_the_private_networks_stay_and_under_fedavg_all_goes():
    lines = {}
    for strategy in ("fedcmr", "fedavg", "local"):
        config = configured(f"strategy.name={strategy}")
        text = "\n".join(describe(config, disclosure(config, sources.dataset(config))))
        lines[strategy] = text.partition("What never leaves it")
    tower = "towers.image"
    assert tower in lines["fedcmr"][2] and tower not in lines["fedcmr"][0]
    assert tower in lines["fedavg"][0] and "of its model all is sent" in lines["fedavg"][2]
    assert "nothing of its model" in lines["local"][0]
