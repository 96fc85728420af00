"""Tables of bad messages, run against the server from outside: a client's packed reply is changed before it is sent."""

from __future__ import annotations

import json
import re

import pytest
import torch
from flwr.app import Array, ConfigRecord, RecordDict

from fedxmr import commands, wire
from fedxmr.errors import FederationError
from fedxmr.simulate import run, simulate
from tests import liars
from tests.federations import SMALL, configured, federate, same_bytes
from tests.liars import LIAR, Liar, facts, first, lacking, scores, tensor, text, without

TOLERANT = "federation.tolerate_failures=true"
BIG = 2**70
NAN, INF = float("nan"), float("inf")


def also(*changes: liars.Change) -> liars.Change:
    """Several changes at once."""

    def change(content: RecordDict) -> None:
        for one in changes:
            one(content)

    return change


def emptied(content: RecordDict) -> None:
    content.clear()


def with_a_record(content: RecordDict) -> None:
    content["more"] = ConfigRecord({"a": 1})


ABSTAINING = also(facts(loss=None), lacking("common.weight", "common.bias"))

BAD_UPDATES = {
    "missing name": (lacking("common.bias"), "lacks common.bias"),
    "no arrays": (lacking("common.bias", "common.weight"), "lacks common.bias, common.weight"),
    "extra name": (tensor("towers.x", lambda _: torch.ones(2)), "brings towers.x, which it does not share"),
    "transposed": (tensor("common.weight", lambda w: w.T), r"common.weight: expected \[4, 8\] .* got \[8, 4\]"),
    "broadcastable row": (tensor("common.weight", lambda w: w[:1]), r"expected \[4, 8\] torch.float32, got \[1, 8\]"),
    "broadcastable number": (tensor("common.bias", lambda b: b[:1]), r"common.bias: expected \[4\] .* got \[1\]"),
    "scalar": (tensor("common.bias", lambda b: b[0]), r"common.bias: expected \[4\] torch.float32, got \[\]"),
    "one more axis": (tensor("common.bias", lambda b: b[None]), r"common.bias: expected \[4\] .* got \[1, 4\]"),
    "empty": (tensor("common.bias", lambda b: b[:0]), r"common.bias: expected \[4\] torch.float32, got \[0\]"),
    "float64": (tensor("common.bias", torch.Tensor.double), "got .* torch.float64"),
    "int64": (tensor("common.bias", torch.Tensor.long), "got .* torch.int64"),
    "bool": (tensor("common.bias", torch.Tensor.bool), "got .* torch.bool"),
    "NaN": (tensor("common.bias", first(NAN)), "common.bias: not finite"),
    "inf": (tensor("common.bias", first(INF)), "common.bias: not finite"),
    "-inf": (tensor("common.weight", first(-INF)), "common.weight: not finite"),
    "arrays as Flower packs them": (liars.pickled, "0: expected raw bytes, got numpy.ndarray"),
    "too few bytes": (
        liars.array("common.bias", Array("float32", (4,), "fedxmr.raw", b"1")),
        "common.bias: expected 16 bytes",
    ),
    "too many bytes": (liars.array("common.bias", Array("float32", (4,), "fedxmr.raw", b"1" * 17)), "16 bytes"),
    "absurd shape": (
        liars.array("common.bias", Array("float32", (0, 2**62, 2**62), "fedxmr.raw", b"")),
        "common.bias: no tensor has the shape",
    ),
    "no such type": (liars.array("common.bias", Array("float16", (4,), "fedxmr.raw", b"1" * 8)), "float16"),
    "loss NaN": (facts(loss=NAN), "loss nan, expected finite and >= 0"),
    "loss inf": (facts(loss=INF), "loss inf, expected finite and >= 0"),
    "loss beyond float64": (facts(loss=10**400), "loss inf, expected finite and >= 0"),
    "loss negative": (facts(loss=-0.1), "loss -0.1, expected finite and >= 0"),
    "loss a word": (facts(loss="0.5"), "not an update: loss: input should be a valid number, got '0.5'"),
    "loss true": (facts(loss=True), "not an update: loss: input should be a valid number, got True"),
    "arrays without a loss": (facts(loss=None), "arrays common.bias, common.weight without a loss"),
    "n of 0": (facts(n=0), "says 0 training items, registered were 20"),
    "n of 0, abstaining": (also(ABSTAINING, facts(n=0)), "says 0 training items"),
    "n of -9": (facts(n=-9), "says -9 training items"),
    "n of 1e12": (facts(n=10**12), "says 1000000000000 training items"),
    "n other than registered": (facts(n=21), "says 21 training items, registered were 20"),
    "n of 20.0": (facts(n=20.0), "not an update: n: input should be a valid integer, got 20.0"),
    "n of 20.5": (facts(n=20.5), "not an update: n: input should be a valid integer, got 20.5"),
    "n a word": (facts(n="20"), "not an update: n: input should be a valid integer, got '20'"),
    "n true": (facts(n=True), "not an update: n: input should be a valid integer, got True"),
    "n beyond int64": (facts(n=BIG), "not an update: n: input should be less than"),
    "n null": (facts(n=None), "not an update: n: input should be a valid integer, got None"),
    "class counts other than registered": (facts(class_counts=[20, 0, 0]), "other class counts than it registered"),
    "class counts too few": (facts(class_counts=[20]), "other class counts than it registered"),
    "class counts of floats": (facts(class_counts=[7.0, 7.0, 6.0]), "not an update: class_counts.0: input should be"),
    "class counts nested": (facts(class_counts=[[7], [7], [6]]), "not an update: class_counts.0: input should be"),
    "class counts beyond int64": (facts(class_counts=[BIG, 0, 0]), "not an update: class_counts.0: input should be"),
    "class counts a number": (
        facts(class_counts=3),
        "not an update: class_counts: input should be a valid array",
    ),
    "stale round": (facts(round=1), "answers for round 1, asked was round 2"),
    "round to come": (facts(round=3), "answers for round 3, asked was round 2"),
    "round a word": (facts(round="2"), "not an update: round: input should be a valid integer, got '2'"),
    "wrong client": (facts(client=2), "answers as client 2"),
    "no such client": (facts(client=-1), "answers as client -1"),
    "no scores": (facts(validation=None), "lacks the validation scores it was asked for"),
    "empty scores": (facts(validation={}), "validation scores of , expected average, image->text, text->image"),
    "a direction missing": (scores("validation", image_to_text=None), "validation scores of average, text->image, exp"),
    "a direction too many": (scores("validation", image_to_audio=0.5), "validation scores of average, image->audio"),
    "score above 1": (scores("validation", image_to_text=1.5), "validation mAP image->text of 1.5, expected 0 to 1"),
    "score negative": (scores("validation", average=-0.5), "validation mAP average of -0.5, expected 0 to 1"),
    "score NaN": (scores("validation", text_to_image=NAN), "validation mAP text->image of nan, expected 0 to 1"),
    "average that is none": (scores("validation", average=1.0), "validation mAP average of 1.0, expected the mean"),
    "test scores unasked": (facts(test={"average": 1.0}), "brings test scores that were not asked for"),
    "seconds NaN": (facts(seconds={"fit": NAN}), "not an update: seconds.fit: input should be"),
    "seconds negative": (facts(seconds={"fit": -1}), "not an update: seconds.fit: input should be"),
    "missing fact": (without("n"), "not an update: n: field required"),
    "extra fact": (facts(model="mine"), "not an update: model: extra inputs are not permitted, got 'mine'"),
    "extra record": (with_a_record, "not an update: brings more"),
    "no JSON": (text("{"), "not an update: invalid JSON"),
    "a list": (text("[]"), "not an update: input should be an object"),
    "a number for text": (text(7), "not an update: invalid JSON"),
    "deep JSON": (text("[" * 100_000), "not an update: invalid JSON: recursion limit exceeded"),
    "nothing": (emptied, "not an update: lacks 'facts'"),
    "a line of its own": (
        facts(**{"a\nclient 0 was rejected\x1b[2J": 1}),
        "not an update: a client 0 was rejected?[2J: extra inputs are not permitted, got 1".replace("?[", r"\?\["),
    ),
}
"""Name -> what is done to the reply of a client, and the reason it is rejected for."""

cases = pytest.mark.parametrize(("change", "reason"), BAD_UPDATES.values(), ids=BAD_UPDATES)


@pytest.fixture
def lie(monkeypatch):
    """Let a client lie from now on."""

    def begin(change: liars.Change, *at: object) -> None:
        monkeypatch.setattr("clients.app.app", Liar(change, *at))

    return begin


@pytest.fixture(scope="module")
def left_out(tmp_path_factory):
    """The run folder of a run in which the client was simply not there in that round."""
    out = tmp_path_factory.mktemp("left") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clients.app.app", Liar(liars.absent))
        summary = federate(out, TOLERANT)
    assert [(entry["round"], entry["client"]) for entry in summary["failed"]] == [(2, 1)]
    return out


@cases
def test_a_bad_update_is_named_and_the_others_go_on_as_if_the_client_had_been_left_out(
    tmp_path, lie, capsys, left_out, change, reason
):
    lie(change)
    summary = federate(tmp_path / "run", TOLERANT)
    (entry,) = summary["rejected"]
    assert (entry["round"], entry["client"], summary["failed"]) == (2, 1, [])
    assert re.search(reason, entry["reason"])
    assert "\n" not in entry["reason"]
    shown = capsys.readouterr()
    assert f"client 1 was rejected in round 2: {entry['reason']}\n" in shown.err
    assert f"rejected: client 1 in round 2: {entry['reason']}\n" in shown.out
    other = json.loads((left_out / "summary.json").read_text())
    for what in ("shared_sha256", "models_sha256", "test", "validation"):
        assert summary[what] == other[what]
    assert lines(tmp_path / "run") == lines(left_out)


def lines(out):
    """metrics.jsonl without what a rejected client sent: those bytes were moved all the same."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        if (line["round"], line["client"]) == (2, LIAR):
            line.pop("bytes_up", None)
    return found


@cases
def test_a_bad_update_ends_a_strict_run(tmp_path, lie, capsys, change, reason):
    lie(change)
    arguments = [*SMALL, "--engine", "local", "--no-pictures", "--out", str(tmp_path / "run")]
    assert commands.run(simulate, arguments) == commands.FAILED
    *_, line, _ = capsys.readouterr().err.splitlines()  # the last one says how to go on
    assert line.startswith("error: client 1 was rejected in round 2: ")
    assert re.search(reason, line)


def test_a_client_that_is_left_out_makes_a_difference(tmp_path, left_out):
    federate(tmp_path / "whole", TOLERANT)
    assert not same_bytes(tmp_path / "whole", left_out)


def test_min_clients_decides_whether_the_round_stands(tmp_path, lie):
    lie(facts(loss=NAN))
    federate(tmp_path / "two", TOLERANT, "federation.min_clients=2")
    with pytest.raises(FederationError, match=r"^round 2: 2 good updates, expected at least 3\n"):
        federate(tmp_path / "three", TOLERANT, "federation.min_clients=3")


@pytest.mark.parametrize("loss", [0.0, 5e-324, 1e-320, 1e308])
@pytest.mark.parametrize("weigh", ["gompertz", "examples", "uniform"])
def test_any_finite_loss_may_count(tmp_path, lie, weigh, loss):
    lie(facts(loss=loss))
    summary = federate(tmp_path / "run", f"strategy.weigh={weigh}")
    assert summary["rejected"] == []
    weights = [line["weight"] for line in lines(tmp_path / "run") if line["round"] == 2]
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0


def test_float32s_largest_numbers_may_count(tmp_path, lie):
    lie(tensor("common.weight", lambda w: torch.full_like(w, torch.finfo(w.dtype).max)), wire.TRAIN, 3)
    assert federate(tmp_path / "run", "strategy.merge=replace", TOLERANT)["participation"]["3"] == [0, 1, 2]


BAD_REGISTRATIONS = {
    "NaN in a mean": (tensor("mean/image", first(NAN)), "mean and centred squares of image: give no finite"),
    "inf in a mean": (tensor("mean/image", first(INF)), "mean and centred squares of image: give no finite"),
    "a mean beyond float32": (tensor("mean/image", first(1e300)), "mean and centred squares of image: give no finite"),
    "NaN in the squares": (tensor("centred/image", first(NAN)), "centred squares of image: expected >= 0"),
    "inf in the squares": (tensor("centred/image", first(INF)), "mean and centred squares of image: give no finite"),
    "negative squares": (tensor("centred/text", first(-1)), "centred squares of text: expected >= 0"),
    "a mean too short": (
        tensor("mean/image", lambda m: m[:1]),
        r"mean of image: expected \[6\] .* got \[1\]",
    ),
    "a mean in float32": (tensor("mean/image", torch.Tensor.float), "mean of image: expected .* got .* torch.float32"),
    "squares too long": (
        tensor("centred/image", lambda c: torch.cat([c, c])),
        r"squares of image: .* got \[12\]",
    ),
    "no moments": (
        also(facts(moments=["text"]), lacking("mean/image", "centred/image")),
        "standardisation of image: expected True, got False",
    ),
    "moments that do not come": (lacking("mean/image"), "not a registration: lacks 'mean/image'"),
    "moments that are not held": (facts(held={"text": 20}), "not a registration: lacks 'image'"),
    "moments unannounced": (facts(moments=["text"]), "not a registration: brings centred/image, mean/image"),
    "holds what there is not": (
        facts(held={"image": 20, "text": 20, "audio": 1}),
        "holds 1 of audio: expected",
    ),
    "holds more than it has": (
        facts(held={"image": 21, "text": 20}),
        "holds 21 of image: expected 1 to 20 of",
    ),
    "holds less than one": (facts(held={"image": 0, "text": 20}), "holds 0 of image: expected 1 to 20 of image, text"),
    "held a list": (facts(held=["image", "text"]), "not a registration: held: input should be"),
    "class counts above n": (tensor("class_counts", first(21)), "class counts: expected 0 to 20, its training items"),
    "class counts negative": (tensor("class_counts", first(-1)), "class counts: expected 0 to 20"),
    "class counts of floats": (
        tensor("class_counts", torch.Tensor.double),
        r"class counts: expected \[3\] torch.int64",
    ),
    "class counts too few": (
        tensor("class_counts", lambda c: c[:2]),
        r"class counts: expected \[3\] .* got \[2\]",
    ),
    "no class counts": (lacking("class_counts"), "not a registration: lacks 'class_counts'"),
    "n of 0": (facts(n=0), "class counts: expected 0 to 0, its training items"),
    "n of 1e12": (
        facts(n=10**12),
        "expected training items with a class or a modality, got 1000000000000",
    ),
    "n of 20.0": (facts(n=20.0), "not a registration: n: input should be a valid integer, got 20.0"),
    "seen too long": (
        tensor("seen", lambda _: torch.ones(4).bool()),
        r"seen classes: expected \[3\] .* got \[4\]",
    ),
    "seen unlike the others'": (tensor("seen", lambda _: torch.ones(3).bool()), "seen classes: expected None, got"),
    "seen of other bytes": (
        liars.array("seen", Array("bool", (3,), "fedxmr.raw", b"\1\2\0")),
        "seen: expected bytes of 0 and 1 for bool, got 2",
    ),
    "class vectors NaN": (tensor("class_vectors", lambda _: torch.full((3, 2), NAN)), "class vectors: not finite"),
    "class vectors too few": (tensor("class_vectors", lambda _: torch.ones(2, 2)), r"class vectors: expected \[3, k\]"),
    "other widths": (facts(dims={"image": 7, "text": 4}), "feature widths: expected .*'image': 6.* got .*'image': 7"),
    "no widths": (facts(dims={}), "expected modalities and classes, got widths {} and 3 classes"),
    "absurd widths": (facts(dims={"image": 2**60, "text": 4}), "feature widths: expected .* got"),
    "other classes": (facts(num_classes=4), r"class counts: expected \[4\] torch.int64, got \[3\]"),
    "another initial state": (facts(initial_sha256="ab"), "seeded initial state: expected .* got ab"),
    "another version": (facts(versions={"torch": "1"}), "versions: expected .* got"),
    "an extra array": (tensor("items", lambda _: torch.ones(2)), "not a registration: brings items"),
    "nothing": (emptied, "not a registration: lacks 'facts'"),
    "no JSON": (text("hello"), "not a registration: invalid JSON"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_REGISTRATIONS.values(), ids=BAD_REGISTRATIONS)
def test_a_bad_registration_ends_the_run_before_it_begins(tmp_path, lie, change, reason):
    lie(change, wire.START, 0)
    with pytest.raises(FederationError) as caught:
        federate(tmp_path / "run", TOLERANT)
    about = [line for line in str(caught.value).splitlines() if re.search(reason, line)]
    assert about, caught.value
    assert about[0].startswith("client 1: ") or about[0].endswith("(node 3)")
    assert not re.search("client [02]", str(caught.value))


def test_a_client_that_claims_anothers_name_is_found(tmp_path, lie):
    lie(facts(client=2), wire.START, 0)
    with pytest.raises(FederationError, match=r"^client 2: claimed by 2 nodes\nclient 1: did not register\n"):
        federate(tmp_path / "run")


BAD_REPORTS = {
    "wrong client": (facts(client=2), "final report: reports as client 2"),
    "score above 1": (scores("last", average=1.5), "final report: last mAP average of 1.5, expected 0 to 1"),
    "score NaN": (scores("last", image_to_text=NAN), "final report: last mAP image->text of nan, expected 0 to 1"),
    "wrong directions": (scores("last", image_to_text=None, a_to_b=0.5), "final report: last scores of a->b, average"),
    "no last scores": (facts(last=None), "final report: lacks the last scores it was asked for"),
    "no selected scores": (facts(selected=None), "final report: lacks the selected scores it was asked for"),
    "average that is none": (
        scores("selected", average=0.0),
        "final report: selected mAP average of 0.0",
    ),
    "no hash": (facts(state_sha256="mine"), "final report: expected the SHA-256 of its final state, got 'mine'"),
    "scores a word": (facts(last="good"), "not a report: last: input should be"),
    "extra fact": (facts(n=3), "not a report: n: extra inputs are not permitted"),
    "nothing": (emptied, "not a report: lacks 'facts'"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_REPORTS.values(), ids=BAD_REPORTS)
def test_a_bad_final_report_is_named_and_does_not_count(tmp_path, lie, change, reason):
    lie(change, wire.FINISH, 4)
    summary = federate(tmp_path / "run", TOLERANT)
    (entry,) = summary["rejected"]
    assert (entry["round"], entry["client"]) == (4, 1)
    assert re.search(reason, entry["reason"])
    for which in ("selected", "last"):
        assert [own["client"] for own in summary["test"][which]["clients"]] == [0, 2]
    with pytest.raises(FederationError, match=f"^client 1 was rejected in round 4: {reason}"):
        federate(tmp_path / "strict")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (facts(client=2), r"expected Checkpoint\(client=1, base=2, .* got Checkpoint\(client=2, base=2"),
        (
            facts(file="checkpoint/round-9/client-9.safetensors"),
            r"expected Checkpoint\(client=1, base=2, .* got .*file='checkpoint/round-9/client-9.safetensors'",
        ),
        (facts(base=1), r"expected Checkpoint\(client=1, base=2, .* got .*base=1"),
        (facts(base="2"), "not a checkpoint: base: input should be a valid integer"),
        (emptied, "not a checkpoint: lacks 'facts'"),
    ],
)
def test_an_answer_about_another_state_ends_the_run(tmp_path, lie, change, reason):
    lie(change, wire.CHECKPOINT, 2)
    with pytest.raises(FederationError, match=f"^client 1 failed at query.checkpoint: {reason}"):
        federate(tmp_path / "checkpoint", TOLERANT, "federation.checkpoint_every=2")
    lie(change, wire.RESTORE, 2)
    federate(tmp_path / "restore", "federation.rounds=2", "federation.checkpoint_every=2")
    longer = configured("federation.rounds=4", "federation.checkpoint_every=2")
    with pytest.raises(FederationError, match=f"^client 1 failed at query.restore: {reason}"):
        run(longer, None, resume=tmp_path / "restore", pictures=False)
