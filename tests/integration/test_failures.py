"""Nothing fails quietly: who failed, what was rejected, and what the others lose by it (nothing)."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fedxmr import state
from fedxmr.checks import check_registrations, find_fault
from fedxmr.errors import FederationError
from fedxmr.machine import versions
from fedxmr.messages import Registration, Task, Update
from fedxmr.rounds import Client
from fedxmr.selection import Selection
from fedxmr.setting import Setting
from fedxmr.snapshot import Owner
from fedxmr.sources import dataset, parts
from fedxmr.types import DataSpec
from tests.federations import TOY, configured, federate

UNEVEN = (
    *(a for a in TOY if not a.startswith("dataset.items")),
    "dataset.items=61",  # 21, 20 and 20: client 0's count of items seen is its own
    "strategy.joint_fraction=1.0",
    "federation.rounds=4",
)
IN_ROUND_2 = "84"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", "client 0 failed in round 2: RuntimeError: the toy broke"),
        ("nan", "client 0 was rejected in round 2: shared.w: not finite"),
        ("negative", "client 0 was rejected in round 2: loss -1.0, expected finite and >= 0"),
    ],
)
def test_a_failure_ends_the_run_naming_client_round_and_reason(tmp_path, how, says):
    with pytest.raises(FederationError) as caught:
        federate(tmp_path / "run", f"learner.misbehaves={{'{IN_ROUND_2}': {how}}}", base=UNEVEN)
    assert str(caught.value) == says
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["round"] for line in kept} >= {1}


@pytest.mark.parametrize(("how", "kind"), [("raise once", "failed"), ("nan once", "rejected")])
def test_a_tolerated_failure_is_listed_and_the_client_goes_on_from_its_last_accepted_state(tmp_path, how, kind):
    assignments = (
        f"learner.misbehaves={{'{IN_ROUND_2}': {how}}}",
        f"learner.once={tmp_path / kind}",
        "federation.tolerate_failures=true",
    )
    summary = federate(tmp_path / "run", *assignments, base=UNEVEN)
    assert [(entry["round"], entry["client"]) for entry in summary[kind]] == [(2, 0)]
    assert summary["participation"]["2"] == [0, 1, 2]
    seen = []
    for k in range(3):
        tensors, _ = state.load(tmp_path / "run" / "clients" / str(k) / "last.safetensors")
        seen.append(tensors["weights/private.v"].item())
    assert seen == [3 * 42, 4 * 40, 4 * 40]


def test_a_raised_and_a_rejected_update_leave_the_same_bytes(tmp_path):
    runs = []
    for how in ("raise once", "nan once", "negative once"):
        assignments = (f"learner.misbehaves={{'{IN_ROUND_2}': {how}}}", f"learner.once={tmp_path / how}.once")
        runs.append(federate(tmp_path / how, *assignments, "federation.tolerate_failures=true", base=UNEVEN))
    assert len({run["shared_sha256"] for run in runs}) == 1
    assert len({run["models_sha256"] for run in runs}) == 1


def test_a_failure_in_the_last_message_leaves_the_last_accepted_state(tmp_path):
    """Client 0's enhancement fails as it is flushed: its last model is that of its last accepted reply."""
    flushing = ("learner.misbehaves={'126': raise}", "federation.tolerate_failures=true", "federation.rounds=3")
    uneven = (*(a for a in UNEVEN if "joint_fraction" not in a), "strategy.joint_fraction=0.8", *flushing)
    summary = federate(tmp_path / "run", base=uneven)
    assert [(entry["round"], entry["client"]) for entry in summary["failed"]] == [(4, 0)]
    tensors, about = state.load(tmp_path / "run" / "clients" / "0" / "last.safetensors")
    assert tensors["weights/private.v"].item() == 3 * 2 * 17 + 2 * 2 * 4
    assert about["round"] == 3
    for part in ("test", "validation"):
        assert [own["client"] for own in summary[part]["last"]["clients"]] == [1, 2]


def test_a_round_in_which_a_client_was_not_measured_does_not_lead():
    selection = Selection()
    scores = {0: {"average": 0.2}, 1: {"average": 0.7}}
    selection.offer(1, scores, {})
    selection.offer(2, {1: {"average": 0.6}}, {})
    assert selection.round == 1
    selection.offer(3, {0: {"average": 0.3}, 1: {"average": 0.7}}, {})
    selection.offer(4, {0: {"average": 0.4}, 1: {"average": 0.6}}, {})
    assert selection.round == 3  # ties go to the earlier round


def test_a_rejected_client_is_checkpointed_as_it_was_last_accepted(tmp_path):
    assignments = (f"learner.misbehaves={{'{IN_ROUND_2}': nan once}}", "federation.tolerate_failures=true")
    for name, every in (("often", 1), ("never", 0)):
        once = f"learner.once={tmp_path / name}.once"
        federate(tmp_path / name, *assignments, once, f"federation.checkpoint_every={every}", base=UNEVEN)
    often, never = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("often", "never"))
    assert often["models_sha256"] == never["models_sha256"]


def test_a_round_with_too_few_good_updates_does_not_stand(tmp_path):
    broken = "learner.misbehaves={'80': raise}"  # clients 1 and 2 in round 2
    with pytest.raises(FederationError, match="round 2: 1 good updates, expected at least 2"):
        federate(tmp_path / "run", broken, "federation.tolerate_failures=true", base=UNEVEN)
    federate(tmp_path / "one", broken, "federation.tolerate_failures=true", "federation.min_clients=1", base=UNEVEN)


def test_in_this_process_a_late_client_is_waited_for_and_its_answer_does_not_count(tmp_path, monkeypatch):
    sleeping: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr("tests.toy.time", SimpleNamespace(sleep=lambda s: (sleeping.append(s), sleep(2.1))))
    late = (f"learner.misbehaves={{'{IN_ROUND_2}': hang once}}", f"learner.once={tmp_path / 'once'}")
    with pytest.raises(FederationError, match=r"^client 0 failed in round 2: no answer within 2 s\n"):
        federate(tmp_path / "strict", *late, "federation.deadline=2", base=UNEVEN)
    (tmp_path / "once").unlink()
    federate(tmp_path / "late", *late, "federation.deadline=2", "federation.tolerate_failures=true", base=UNEVEN)
    assert sleeping == [3600, 3600]
    (tmp_path / "once").unlink()
    raises = (late[0].replace("hang", "raise"), late[1], "federation.tolerate_failures=true")
    federate(tmp_path / "raised", *raises, base=UNEVEN)
    late_one, raised = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("late", "raised"))
    assert [(at["round"], at["client"]) for at in late_one["failed"]] == [(2, 0)]
    for key in ("shared_sha256", "models_sha256"):
        assert late_one[key] == raised[key]


def test_an_interrupted_run_keeps_what_was_measured(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        federate(tmp_path / "run", f"learner.misbehaves={{'{IN_ROUND_2}': interrupt}}", base=UNEVEN)
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["round"], line["client"]) for line in kept if "loss" in line] == [(1, 0), (1, 1), (1, 2)]


def client(*assignments: str, base: tuple[str, ...] = TOY) -> Client:
    config = configured(*assignments, base=base)
    data = dataset(config)
    return Client(Setting(config, data), partial(parts(config)[0].take, data.train), Owner(0, "ab"))


def equal(one: Update, other: Update) -> bool:
    same = one.loss == other.loss and one.shared.keys() == other.shared.keys()
    return same and all(torch.equal(one.shared[n], other.shared[n]) for n in one.shared)


def test_a_repeated_message_gives_the_same_reply():
    one = client("federation.tolerate_failures=true")
    w = {"shared.w": torch.zeros(1)}
    first = one.take_part(Task(1, 0, 0, w))
    assert equal(one.take_part(Task(1, 0, 0, w)), first)
    second = one.take_part(Task(2, 0, 1, w))
    assert equal(one.take_part(Task(2, 0, 1, w)), second)
    assert not equal(first, second)


def test_a_state_that_is_not_there_is_an_error_not_a_guess():
    one = client()
    one.take_part(Task(1, 0, 0, {"shared.w": torch.zeros(1)}))
    with pytest.raises(RuntimeError, match="client 0 holds no state of round 7"):
        one.take_part(Task(8, 0, 7, {"shared.w": torch.zeros(1)}))


def test_an_evaluation_on_a_copy_leaves_the_training_state_as_it_was():
    w = {"shared.w": torch.full((1,), 3.0)}
    one, other = client(), client()
    for c in (one, other):
        c.take_part(Task(1, 0, 0, w))
    one.take_part(Task(2, 0, 1, w, fit=False, keep=False, evaluate=True))
    one.take_part(Task(3, 0, 1, w, fit=False, keep=False, evaluate=True))
    assert equal(one.take_part(Task(4, 0, 1, w)), other.take_part(Task(4, 0, 1, w)))


SPEC = DataSpec({"image": 4, "text": 2}, 2)
REGISTERED = Registration(1, 10, torch.tensor([4, 6]), SPEC, {"image": 10}, {}, versions(), "aa")
TASK = Task(3, 1, 2, {})
SCORES = {"image->text": 0.5, "text->image": 0.25, "average": 0.375}
GOOD = Update(3, 1, 10, torch.tensor([4, 6]), 0.5, {"w": torch.ones(2, 3), "b": torch.ones(3)})
EXPECTED = {"w": torch.zeros(2, 3), "b": torch.zeros(3)}


def test_a_good_update_and_an_abstention_have_no_fault():
    assert find_fault(GOOD, TASK, REGISTERED, EXPECTED) is None
    abstains = dataclasses.replace(GOOD, loss=None, shared={})
    assert find_fault(abstains, TASK, REGISTERED, EXPECTED) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"client": 2}, "answers as client 2"),
        ({"round": 2}, "answers for round 2, asked was round 3"),
        ({"n": 11}, "says 11 training items, registered were 10"),
        ({"n": 0}, "says 0 training items"),
        ({"n": -9}, "says -9 training items"),
        ({"class_counts": torch.tensor([5, 5])}, "other class counts"),
        ({"loss": float("nan")}, "loss nan"),
        ({"loss": float("inf")}, "loss inf"),
        ({"loss": -0.1}, "loss -0.1"),
        ({"loss": None}, "without a loss"),
        ({"shared": {"w": torch.ones(2, 3)}}, "lacks b"),
        ({"shared": {**GOOD.shared, "x": torch.ones(1)}}, "brings x"),
        ({"shared": {**GOOD.shared, "b": torch.ones(1)}}, r"b: expected \[3\]"),
        ({"shared": {**GOOD.shared, "b": torch.ones(3).double()}}, "float64"),
        ({"shared": {**GOOD.shared, "b": torch.tensor([1, float("nan"), 1])}}, "b: not finite"),
        ({"shared": {**GOOD.shared, "b": torch.tensor([1, float("inf"), 1])}}, "b: not finite"),
        ({"validation": SCORES}, "scores that were not asked for"),
    ],
)
def test_a_bad_update_is_named(change, says):
    fault = find_fault(dataclasses.replace(GOOD, **change), TASK, REGISTERED, EXPECTED)
    assert fault is not None
    import re

    assert re.search(says, fault), fault


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (None, "lacks the validation scores it was asked for"),
        ({**SCORES, "image->text": 1.5}, "validation mAP image->text of 1.5"),
        ({**SCORES, "average": float("nan")}, "validation mAP average of nan"),
        ({"image->text": 0.5}, "scores of image->text, expected average, image->text, text->image"),
    ],
)
def test_bad_scores_are_named(scores, says):
    asked = dataclasses.replace(TASK, evaluate=True)
    assert find_fault(dataclasses.replace(GOOD, validation=SCORES), asked, REGISTERED, EXPECTED) is None
    fault = find_fault(dataclasses.replace(GOOD, validation=scores), asked, REGISTERED, EXPECTED)
    assert fault is not None
    assert says in fault


def test_training_that_was_not_asked_for_is_refused():
    asked = dataclasses.replace(TASK, fit=False)
    assert find_fault(GOOD, asked, REGISTERED, EXPECTED) == "trained without being asked to"


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([], "client 0: did not register"),
        ([{"client": 1}], "client 1: claimed by 2 nodes"),
        ([{"client": 7}], "client 7: expected an id from 0 to 1"),
        (
            [{"client": 0, "spec": DataSpec({"image": 5, "text": 2}, 2)}],
            "client 1: feature widths: expected {'image': 5",
        ),
        ([{"client": 0, "versions": {"torch": "2"}}], "client 0: versions: expected the server's {"),
        ([{"client": 0, "spec": dataclasses.replace(SPEC, class_vectors=torch.ones(2, 3))}], "class vectors: expected"),
        ([{"client": 0, "spec": dataclasses.replace(SPEC, seen=torch.ones(2).bool())}], "seen classes: expected"),
        ([{"client": 0, "initial_sha256": "bb"}], "client 1: seeded initial state: expected bb, got aa"),
        ([{"client": 0, "n": 0}], "client 0: class counts: expected 0 to 0, its training items"),
    ],
)
def test_registrations_that_do_not_agree_stop_the_run(others, says):
    all_ = sorted([*(dataclasses.replace(REGISTERED, **o) for o in others), REGISTERED], key=lambda r: r.client)
    with pytest.raises(FederationError) as caught:
        check_registrations(all_, 2)
    assert says in str(caught.value)
