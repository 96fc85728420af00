"""What a federation must do whatever learner it runs: determinism, sampling, evaluation, selection, the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fedxmr
from fedxmr import state
from fedxmr.config import Config, override, read_yaml, resolve
from fedxmr.errors import InputError
from fedxmr.evaluation import evaluate
from fedxmr.participation import panel, sampled
from fedxmr.sources import dataset
from fedxmr.types import Items
from tests.federations import SMALL, TOY, configured, federate, same_bytes

SUMMARY_KEYS = [
    "dataset",
    "learner",
    "strategy",
    "engine",
    "clients",
    "rounds",
    "seed",
    "test",
    "validation",
    "bytes",
    "seconds",
    "participation",
    "abstained",
    "dropped",
    "rejected",
    "failed",
    "recovered",
    "shared_sha256",
    "models_sha256",
]


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["fedcmr", "fedavg", "fedprox", "local"])
def test_one_seed_gives_one_run_and_another_seed_another(tmp_path, strategy):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        federate(tmp_path / name, f"strategy={strategy}", f"seed={seed}")
    assert same_bytes(tmp_path / "a", tmp_path / "b")
    assert not same_bytes(tmp_path / "a", tmp_path / "c")


def test_evaluation_never_changes_training(tmp_path):
    runs = {}
    for every in (1, 2, 0):
        federate(tmp_path / str(every), f"evaluation.every={every}", "federation.sample=2", "federation.clients=4")
        runs[every] = json.loads((tmp_path / str(every) / "summary.json").read_text())
    assert len({r["shared_sha256"] for r in runs.values()}) == 1
    assert len({r["models_sha256"] for r in runs.values()}) == 1
    assert len({json.dumps(r["bytes"]) for r in runs.values()}) == 1
    assert runs[0]["test"] == {"selected": None, "last": None}


def test_with_everyone_taking_part_switching_evaluation_off_leaves_every_model_the_same(tmp_path):
    on = federate(tmp_path / "on")
    off = federate(tmp_path / "off", "evaluation.every=0")
    assert on["models_sha256"] == off["models_sha256"]


def test_who_is_evaluated_does_not_matter(tmp_path):
    all_, few = (federate(tmp_path / str(n), f"evaluation.clients={n}") for n in (20, 2))
    assert all_["shared_sha256"] == few["shared_sha256"]
    assert all_["models_sha256"] == few["models_sha256"]
    assert [c["client"] for c in few["test"]["last"]["clients"]] == panel(configured("evaluation.clients=2"))


def test_a_federation_of_one_local_client_is_centralised_training(tmp_path):
    from fedxmr.centralized import centralized

    one = federate(tmp_path / "one", "strategy=local", "federation.clients=1")
    file = tmp_path / "config.yaml"
    tree = override({}, SMALL)
    file.write_text(yaml.safe_dump(tree))
    centralized(config=file, out=tmp_path / "central", pictures=False)
    assert same_bytes(tmp_path / "one", tmp_path / "central")
    assert one["clients"] == 1


def test_sampling_is_a_function_of_seed_and_round():
    config = configured("federation.clients=10", "federation.sample=3", "federation.rounds=30")
    drawn = [sampled(config, t) for t in range(1, 31)]
    assert drawn == [sampled(config, t) for t in range(1, 31)]
    assert all(len(set(d)) == 3 and d == sorted(d) for d in drawn)
    assert set().union(*drawn) == set(range(10))
    other = config.model_copy(update={"seed": 1})
    assert drawn != [sampled(other, t) for t in range(1, 31)]


def test_sampled_clients_alone_train_and_the_others_are_only_evaluated(tmp_path):
    summary = federate(tmp_path / "run", "federation.clients=5", "federation.sample=2", "federation.rounds=4")
    config = configured("federation.clients=5", "federation.sample=2", "federation.rounds=4")
    assert summary["participation"] == {str(t): sampled(config, t) for t in range(1, 5)}
    for line in lines(tmp_path / "run"):
        assert ("loss" in line) == (line["client"] in sampled(config, line["round"]))
        assert "validation" in line
    assert [(m["round"], m["client"]) for m in lines(tmp_path / "run")] == [
        (t, k) for t in range(1, 5) for k in range(5)
    ]


def test_a_client_sampled_again_merges_with_its_own_change_of_the_last_time(tmp_path):
    """W_{u-1} + gamma (W_s - W_0), from a hand calculation over whole runs of the one-number learner."""
    assignments = ("federation.clients=3", "federation.sample=1", "federation.rounds=8", "strategy.gamma=0.5")
    assignments += ("strategy.joint_fraction=1.0", "evaluation.every=0", "dataset.difficulty=1.0")
    config = configured(*assignments, base=TOY)
    federate(tmp_path / "run", *assignments, base=TOY)

    move = moves(config)
    shared = initial_w(config)
    change: dict[int, float] = {}
    for t in range(1, 9):
        (k,) = sampled(config, t)
        before = shared + 0.5 * change.get(k, 0.0)
        change[k] = move[k]
        shared = before + move[k]
    tensors, _ = state.load(tmp_path / "run" / "shared-last.safetensors")
    assert tensors["shared.w"].item() == pytest.approx(shared, abs=1e-5)
    for k, own in change.items():
        last, _ = state.load(tmp_path / "run" / "clients" / str(k) / "last.safetensors")
        assert last["weights/shared.w"].item() == pytest.approx(shared + 0.5 * own, abs=1e-5)


def moves(config: Config) -> list[float]:
    from tests.reference.test_rounds_reference import start

    items, _ = start(config)
    return [0.25 * config.federation.epochs * part.features["image"][:, 0].mean().item() for part in items]


def initial_w(config: Config) -> float:
    from fedxmr.setting import initial_state

    return initial_state(config, dataset(config).spec)["shared.w"].item()


def test_an_abstaining_client_receives_but_does_not_count(tmp_path):
    assignments = ("partition.scheme=missing-modality", "partition.missing=0.34", "learner.abstains_without=image")
    summary = federate(tmp_path / "run", *assignments, base=TOY)
    silent = {line["client"] for line in lines(tmp_path / "run") if "loss" not in line}
    assert len(silent) == 1
    assert summary["rejected"] == summary["failed"] == []
    (k,) = silent
    assert summary["abstained"] == {str(t): [k] for t in range(1, 4)}
    shared, _ = state.load(tmp_path / "run" / "shared-last.safetensors")
    last, _ = state.load(tmp_path / "run" / "clients" / str(k) / "last.safetensors")
    assert torch.equal(last["weights/shared.w"], shared["shared.w"])  # no change of its own to add
    assert last["weights/private.v"].item() == 0


def test_a_run_in_which_nobody_can_train_says_so(tmp_path, capsys):
    federate(tmp_path / "run", "learner.abstains_without=audio", base=TOY)
    told = capsys.readouterr().out
    assert "warning: no client trained in any round" in told
    assert "client 0: 0; abstained in 1-3" in told


def test_a_client_that_lacks_a_modality_sends_and_counts_only_for_what_it_owns(tmp_path):
    assignments = ("strategy=fedavg", "partition.scheme=missing-modality", "partition.missing=0.34")
    federate(tmp_path / "run", *assignments)
    up = {line["client"]: line["bytes_up"] for line in lines(tmp_path / "run") if line["round"] == 1}
    down = {line["client"]: line["bytes_down"] for line in lines(tmp_path / "run") if line["round"] == 2}
    assert len(set(up.values())) == 2
    assert len(set(down.values())) == 1


def test_the_summary_has_the_documented_keys_and_parts_that_add_up(tmp_path):
    summary = federate(tmp_path / "run")
    assert list(summary) == SUMMARY_KEYS
    seconds = dict(summary["seconds"])
    assert list(seconds) == ["total", "start_up", "fit", "evaluate", "state", "messages", "aggregation", "other"]
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()), abs=1e-3)
    assert set(summary["test"]) == set(summary["validation"]) == {"selected", "last"}
    for part in ("test", "validation"):
        for scored in summary[part].values():
            assert list(scored) == ["round", "mean", "clients"]
            assert [c["client"] for c in scored["clients"]] == [0, 1, 2]
            for direction, mean in scored["mean"].items():
                assert mean == pytest.approx(sum(c[direction] for c in scored["clients"]) / 3)


def test_best_on_test_is_looked_at_only_under_the_paper_protocol(tmp_path):
    honest = federate(tmp_path / "honest")
    paper = federate(tmp_path / "paper", "evaluation.protocol=paper")
    assert not any("test" in line for line in lines(tmp_path / "honest"))
    best = paper["test"].pop("best_on_test")
    per_round = {}
    for line in lines(tmp_path / "paper"):
        per_round.setdefault(line["round"], []).append(line["test"]["average"])
    means = {t: sum(values) / len(values) for t, values in per_round.items()}
    assert best["round"] == max(means, key=means.__getitem__)
    assert best["mean"]["average"] == pytest.approx(max(means.values()))
    assert paper["test"] == honest["test"]
    assert paper["models_sha256"] == honest["models_sha256"]


def test_the_selected_round_leads_on_validation_and_its_models_are_the_ones_kept(tmp_path):
    out = tmp_path / "run"
    summary = federate(out, "federation.rounds=6", "learner.optimizer.lr=0.01")
    means: dict[int, list[float]] = {}
    for line in lines(out):
        means.setdefault(line["round"], []).append(line["validation"]["average"])
    averages = {t: sum(values) / 3 for t, values in means.items()}
    chosen = max(averages, key=averages.__getitem__)
    assert summary["test"]["selected"]["round"] == summary["validation"]["selected"]["round"] == chosen
    assert state.load(out / "shared-selected.safetensors")[1]["round"] == chosen

    config = resolve(read_yaml(out / "config.yaml"))
    items = dataset(config).test
    for which in ("selected", "last"):
        for own in summary["test"][which]["clients"]:
            model = fedxmr.load(out, own["client"], which)
            scores = evaluate(model.learner, model.scale(items), config.seed)
            assert scores == {d: s for d, s in own.items() if d != "client"}


def test_a_loaded_model_encodes_raw_features(tmp_path):
    out = tmp_path / "run"
    federate(out)
    test = dataset(resolve(read_yaml(out / "config.yaml"))).test
    model = fedxmr.load(out, 1)
    raw = model.encode("image", test.features["image"])
    assert torch.equal(raw, model.learner.encode("image", model.scale(test).features["image"]))
    scores = model.similarity(raw, model.encode("text", test.features["text"]), ("image", "text"))
    assert scores.shape == (30, 30)
    for modality, x, says in (
        ("imag", test.features["image"], "imag: expected one of image, text"),
        ("image", test.features["text"], r"image: expected \[n, 6\] features, got \[30, 4\]"),
    ):
        with pytest.raises(InputError, match=says):
            model.encode(modality, x)


def test_bytes_are_those_of_the_shared_arrays(tmp_path):
    summary = federate(tmp_path / "run")
    size = 4 * (8 * 4 + 4)  # common.weight and common.bias
    rounds, clients = 3, 3
    assert summary["bytes"] == {"down": (rounds + 1) * clients * size, "up": rounds * clients * size}
    for way in ("up", "down"):
        assert summary["bytes"][way] == sum(line[f"bytes_{way}"] for line in lines(tmp_path / "run"))


def test_the_private_networks_never_travel_under_fedcmr(tmp_path):
    federate(tmp_path / "run")
    shared, _ = state.load(tmp_path / "run" / "shared-last.safetensors")
    assert set(shared) == {"common.weight", "common.bias"}


@pytest.mark.parametrize(
    ("assignments", "names"),
    [
        (("strategy=fedavg", "strategy.share=common"), {"common.weight", "common.bias"}),  # LG-FedAvg
        (("strategy=fedavg", "strategy.share=[towers.*, common.*]"), None),  # FedPer
        (("strategy=fedcmr", "strategy.weigh=uniform"), {"common.weight", "common.bias"}),
        (("strategy=fedavg", "strategy.server_step=1.5"), None),
        (("strategy=fedcmr", "strategy.loss=sum", "strategy.size_term=normalised"), {"common.weight", "common.bias"}),
    ],
)
def test_ablations_are_configuration(tmp_path, assignments, names):
    federate(tmp_path / "run", *assignments)
    shared, _ = state.load(tmp_path / "run" / "shared-last.safetensors")
    if names:
        assert set(shared) == names
    assert ("classifier.weight" in shared) == (assignments[1] == "strategy.server_step=1.5")


def test_standardisation_is_that_of_the_pooled_items_on_every_client(tmp_path):
    federate(tmp_path / "run", "partition.scheme=dirichlet", "partition.alpha=0.1")
    config = resolve(read_yaml(tmp_path / "run" / "config.yaml"))
    pooled = dataset(config).train.features
    for k in range(3):
        model = fedxmr.load(tmp_path / "run", k)
        for modality, x in pooled.items():
            torch.testing.assert_close(model.scaler.mean[modality], x.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model.scaler.deviation[modality], x.std(0, unbiased=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["client", "none"])
def test_other_standardisations(tmp_path, how):
    federate(tmp_path / "run", f"federation.standardise={how}", "partition.scheme=dirichlet")
    scalers = [fedxmr.load(tmp_path / "run", k).scaler for k in range(3)]
    assert (len({hash(s) for s in scalers}) == 1) == (how == "none")


def test_a_client_that_scales_by_itself_uses_the_federations_numbers_for_what_it_lacks(tmp_path):
    lacking = ("partition.scheme=missing-modality", "partition.missing=0.34", "federation.standardise=client")
    federate(tmp_path / "run", "strategy=fedavg", *lacking)
    scalers = [fedxmr.load(tmp_path / "run", k).scaler for k in range(3)]
    assert all(set(scaler.mean) == {"image", "text"} for scaler in scalers)


def test_the_run_folder_is_complete_and_its_configuration_repeats_the_run(tmp_path):
    out = tmp_path / "run"
    federate(out, "strategy.gamma=1.0")
    expected = {"config.yaml", "environment.json", "partition.npz", "metrics.jsonl", "timings.jsonl", "retrieval.json"}
    expected |= {"summary.json", "shared-selected.safetensors", "shared-last.safetensors"}
    found = {path.name for path in out.iterdir()}
    assert expected <= found
    assert any(name.startswith("events.out.tfevents") for name in found)
    config = resolve(read_yaml(out / "config.yaml"))
    assert Config.from_yaml(config.to_yaml()) == config
    from fedxmr.simulate import run

    run(config, tmp_path / "again", pictures=False)
    assert same_bytes(out, tmp_path / "again")


def test_metrics_say_nothing_of_time_place_or_engine(tmp_path):
    federate(tmp_path / "run")
    allowed = {"round", "client", "loss", "weight", "validation", "bytes_up", "bytes_down"}
    assert all(set(line) <= allowed for line in lines(tmp_path / "run"))
    assert {"round", "seconds"} <= set(lines(tmp_path / "run", "timings.jsonl")[0])


def test_tensorboard_holds_scores_losses_weights_bytes_and_seconds(tmp_path):
    federate(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for tag in (
        "validation/mean/average",
        "validation/mean/image_to_text",
        "validation/client 0/text_to_image",
        "loss/client 2",
        "weight/client 1",
        "bytes/up",
        "seconds/fit",
        "clients/took part",
    ):
        assert tag in tags, tag
    assert [e.step for e in events.Scalars("validation/mean/average")] == [1, 2, 3]
    assert [e.step for e in events.Scalars("loss/client 0")] == [1, 2, 3]


def test_pictures_are_drawn_as_files_and_in_tensorboard(tmp_path):
    from fedxmr.simulate import run

    run(configured(), tmp_path / "run")
    pictures = ("t-sne", "precision-recall", "precision-scope")
    for name in pictures:
        assert (tmp_path / "run" / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {f"pictures/{name}" for name in pictures}


def test_cross_client_retrieval_is_the_mean_over_ordered_pairs_of_clients(tmp_path):
    out = tmp_path / "run"
    federate(out, "strategy=local", "federation.rounds=4", "learner.optimizer.lr=0.01")
    found = json.loads((out / "retrieval.json").read_text())["cross_client"]
    models = [fedxmr.load(out, k) for k in range(3)]
    test = dataset(configured()).test
    labels = test.labels.int().argmax(1)
    values = []
    for a in range(3):
        for b in range(3):
            if a == b:
                continue
            query, gallery = (
                models[a].encode("image", test.features["image"]),
                models[b].encode("text", test.features["text"]),
            )
            for q in range(len(test)):
                cosines = torch.nn.functional.cosine_similarity(query[q][None], gallery)
                ranked = (labels == labels[q])[cosines.argsort(descending=True)]
                precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
                values.append(precision[ranked].mean().item())
    assert found["image->text"] == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_items_select_keeps_each_items_features_and_labels():
    x = torch.arange(8.0).reshape(4, 2)
    items = Items({"a": x, "b": x[:2] * 10}, {"a": torch.arange(4), "b": torch.tensor([1, 3])}, torch.eye(4).bool())
    got = items.select(torch.tensor([3, 0, 1]))
    assert got.features["a"].tolist() == [[6, 7], [0, 1], [2, 3]]
    assert got.rows["b"].tolist() == [0, 2]
    assert got.features["b"].tolist() == [[20, 30], [0, 10]]
    assert got.labels.int().argmax(1).tolist() == [3, 0, 1]
