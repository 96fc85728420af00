"""Whatever clients send, what the server makes of it is finite, and lies within the range of the updates that count.

The server runs as it is; clients are scripted, so that a whole run takes a few milliseconds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedxmr import state, wire
from fedxmr.engines.carrier import CarrierGrid, client_of
from fedxmr.errors import FederationError
from fedxmr.machine import versions
from fedxmr.messages import Registration, Report, Update
from fedxmr.setting import build_learner, initial_state, owned_names
from fedxmr.strategies import Contribution, combine, gompertz, shared_names
from fedxmr.types import DataSpec, State
from server.app import federate
from tests.federations import configured

CLIENTS, CLASSES = 4, 3
SPEC = DataSpec({"image": 2, "text": 3}, CLASSES)
CONFIG = configured(
    "learner.name=mccn",  # it has names of one modality, and one whose rows belong to classes
    "learner.hidden=2",
    "learner.width=2",
    "strategy.share=trainable",
    f"federation.clients={CLIENTS}",
    "federation.rounds=1",
    "federation.min_clients=1",
    "federation.tolerate_failures=true",
    "federation.checkpoint_every=0",
    "evaluation.every=0",
    base=(),
)
LEARNER = build_learner(CONFIG.learner, SPEC, torch.device("cpu"), None)
SHARED = shared_names(CONFIG.strategy, LEARNER)
INITIAL = {name: tensor for name, tensor in initial_state(CONFIG, SPEC).items() if name in SHARED}


class Scripted(CarrierGrid):
    """Clients that send what is written down, in the order of `order`."""

    engine: ClassVar[str] = "scripted"

    def __init__(self, contents: Mapping[str, Mapping[int, RecordDict]], order: Iterable[int]) -> None:
        super().__init__(CLIENTS)
        self._contents = contents
        self._order = list(order)

    def exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        by_client = {client_of(message.metadata.dst_node_id): message for message in messages}
        for client in (k for k in self._order if k in by_client):
            message = by_client[client]
            round = f" {message.metadata.group_id}" if message.metadata.message_type == wire.TRAIN else ""
            content = self._contents[message.metadata.message_type + round][client]
            yield Message(content, reply_to=message)


@dataclass(frozen=True)
class Sent:
    """What a client says of itself, and what it sends for its update."""

    registration: Registration
    update: Update
    content: RecordDict


def run(sent: Mapping[int, Sent], out: Path, order: Iterable[int], **strategy: Any) -> tuple[State, dict[str, Any]]:
    """The server's whole run: the last shared state and the summary."""
    flushed = {k: Update(2, k, s.update.n, s.update.class_counts, None, {}) for k, s in sent.items()}
    contents = {
        wire.START: {k: wire.pack_registration(s.registration) for k, s in sent.items()},
        f"{wire.TRAIN} 1": {k: s.content for k, s in sent.items()},
        f"{wire.TRAIN} 2": {k: wire.pack_update(update) for k, update in flushed.items()},
        wire.FINISH: {k: wire.pack_report(Report(k, None, None, "0" * 64)) for k in sent},
    }
    config = CONFIG.model_copy(update={"strategy": CONFIG.strategy.model_copy(update=strategy)})
    out.mkdir(exist_ok=True)
    federate(config, out, Scripted(contents, order))
    shared, _ = state.load(out / "shared-last.safetensors")
    return shared, json.loads((out / "summary.json").read_text())


losses = st.sampled_from([0.0, 5e-324, 1e-320, 1.0, 1e308, 1.7e308]) | st.floats(0, allow_infinity=False)
floats = st.sampled_from([0.0, 3.4e38, -3.4e38, 1e-45]) | st.floats(width=32, allow_nan=False, allow_infinity=False)
bad_floats = floats | st.sampled_from([float("nan"), float("inf"), float("-inf")])
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
words = st.text(max_size=8)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def good(draw: st.DrawFn, client: int) -> tuple[Registration, Update]:
    """A client, and an update of it that should count."""
    n = draw(st.integers(1, 50))
    held = dict.fromkeys(draw(st.sampled_from([("image",), ("text",), ("image", "text")])), n)
    counts = torch.tensor(draw(st.lists(st.integers(0, n), min_size=CLASSES, max_size=CLASSES)))
    names = sorted(owned_names(SHARED, LEARNER, held))
    some = draw(st.lists(floats, min_size=1, max_size=6))
    shared = {}
    for name in names:
        size = INITIAL[name].numel()
        shared[name] = torch.tensor((some * size)[:size]).roll(len(name)).reshape(INITIAL[name].shape)
    registration = Registration(client, n, counts, SPEC, held, {}, versions(), state.sha256(INITIAL))
    return registration, Update(1, client, n, counts, draw(losses), shared)


@st.composite
def malformed(draw: st.DrawFn, update: Update) -> RecordDict:
    """An update with something wrong with it (though chance may restore what was right)."""
    content = wire.pack_update(update)
    facts = content.config_records["facts"]
    arrays = content.array_records["arrays"]
    name = draw(st.sampled_from(sorted(arrays)))
    match draw(st.integers(0, 8)):
        case 0:
            said = json.loads(str(facts["json"]))
            key = draw(st.sampled_from(sorted(said)) | words)
            facts["json"] = json.dumps({**said, key: draw(anything)})
        case 1:
            facts["json"] = json.dumps(draw(anything))
        case 2:
            facts["json"] = draw(words)
        case 3:
            del arrays[name]
        case 4:
            arrays[draw(words)] = arrays.pop(name)
        case 5:
            shape = draw(shapes)
            arrays.update(wire.pack_arrays({name: torch.full(shape, draw(bad_floats))}))
        case 6:
            size = INITIAL[name].numel()
            values = draw(st.lists(bad_floats, min_size=size, max_size=size))
            data = struct.pack(f"<{size}f", *values)
            arrays[name] = Array("float32", tuple(INITIAL[name].shape), "fedxmr.raw", data)
        case 7:
            dtype = draw(st.sampled_from(["float32", "float64", "int64", "bool", "float16", "object"]))
            stype = draw(st.sampled_from(["fedxmr.raw", "numpy.ndarray"]))
            arrays[name] = Array(dtype, draw(shapes), stype, draw(st.binary(max_size=48)))
        case 8:
            content[draw(words)] = ConfigRecord({})
    return content


@st.composite
def clients(draw: st.DrawFn) -> dict[int, Sent]:
    """Some that send good updates, client 0 among them, and some that may not."""
    found = {}
    for client in range(CLIENTS):
        registration, update = draw(good(client))
        content = draw(malformed(update)) if client and draw(st.booleans()) else wire.pack_update(update)
        found[client] = Sent(registration, update, content)
    return found


quick = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
weighing = st.fixed_dictionaries(
    {
        "weigh": st.sampled_from(["gompertz", "examples", "uniform"]),
        "size_term": st.sampled_from(["printed", "normalised"]),
        "alpha": st.sampled_from([0.0, 20.0, 100.0]),
    }
)


@quick
@given(sent=clients(), strategy=weighing)
def test_the_aggregate_stays_finite_and_within_the_range_of_the_good_updates(tmp_path, sent, strategy):
    shared, summary = run(sent, tmp_path / "run", range(CLIENTS), **strategy)
    rejected = {entry["client"] for entry in summary["rejected"]}
    assert summary["failed"] == []
    assert not rejected & {k for k, s in sent.items() if s.content == wire.pack_update(s.update)}
    accepted = [wire.unpack_update(s.content) for k, s in sent.items() if k not in rejected]
    contributing = [update for update in accepted if update.loss is not None]
    for name, old in INITIAL.items():
        owners = [update for update in contributing if name in update.shared]
        least, most = old.clone(), old.clone()
        for row in range(len(old)):
            of_row = [u for u in owners if name not in LEARNER.by_class or u.class_counts[row] > 0]
            if of_row:
                values = torch.stack([u.shared[name][row] for u in of_row])
                least[row], most[row] = values.amin(0), values.amax(0)
        got = shared[name]
        assert torch.isfinite(got).all()
        assert ((least <= got) & (got <= most)).all(), name
    weights = [json.loads(line).get("weight") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    weights = [weight for weight in weights if weight is not None]
    assert len(weights) == len(contributing)
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1)


@quick
@given(sent=clients(), order=st.permutations(range(CLIENTS)))
def test_the_order_of_replies_never_matters(tmp_path, sent, order):
    (one, summary), (other, again) = (run(sent, tmp_path / str(i), o) for i, o in enumerate((range(CLIENTS), order)))
    assert state.sha256(one) == state.sha256(other)
    assert {**summary, "seconds": 0} == {**again, "seconds": 0}
    metrics = [(tmp_path / str(i) / "metrics.jsonl").read_bytes() for i in range(2)]
    assert metrics[0] == metrics[1]


def test_with_no_good_update_at_all_the_round_does_not_stand(tmp_path):
    sent = {}
    for client in range(CLIENTS):
        counts = torch.tensor([1, 0, 0])
        registration = Registration(client, 1, counts, SPEC, {"image": 1}, {}, versions(), state.sha256(INITIAL))
        update = Update(1, client, 1, counts, float("nan"), {})
        sent[client] = Sent(registration, update, wire.pack_update(update))
    with pytest.raises(FederationError, match=r"^round 1: 0 good updates, expected at least 1$"):
        run(sent, tmp_path / "run", range(CLIENTS))


def test_huge_losses_weigh_as_their_ratios_do():
    n, classes = torch.tensor([3.0, 5.0, 2.0]).double(), torch.tensor([1.0, 2.0, 2.0]).double()
    ratios = torch.tensor([1.0, 1.5, 0.5]).double()  # whose sum overflows, times 1e308
    torch.testing.assert_close(gompertz(n, classes, ratios * 1e308, 20), gompertz(n, classes, ratios, 20))


def test_where_nobody_has_a_class_items_and_losses_weigh():
    n, ones = torch.tensor([3.0, 1.0]).double(), torch.ones(2).double()
    got = gompertz(n, torch.zeros(2).double(), ones, 20, "normalised")
    torch.testing.assert_close(got, gompertz(n, ones, ones, 20, "normalised"))


def test_a_step_beyond_what_the_type_holds_ends_the_run():
    most = torch.full((2,), torch.finfo(torch.float32).max)
    one = Contribution(0, 1, torch.tensor([1]), 1.0, {"w": most})
    assert torch.equal(combine({"w": -most}, [one], torch.ones(1), frozenset())["w"], most)
    with pytest.raises(FederationError, match=r"^w: not finite when combined$"):
        combine({"w": -most}, [one], torch.ones(1), frozenset(), step=1.5)
