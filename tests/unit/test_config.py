"""Configurations: what wins over what, and that nothing said is lost on the way."""

from __future__ import annotations

import pytest

from fedxmr.config import Config, merged, override, parse_yaml, resolve
from fedxmr.errors import InputError

FILE = {"strategy": {"name": "fedcmr", "gamma": -0.5}, "learner": {"hidden": 64, "optimizer": {"lr": 0.01}}}


@pytest.mark.parametrize("again", ["strategy=fedcmr", "strategy.name=fedcmr", "strategy={name: fedcmr}"])
def test_naming_the_strategy_in_use_keeps_its_options(again):
    assert resolve(override(FILE, [again])).strategy.gamma == -0.5


@pytest.mark.parametrize("again", ["learner=dscmr", "learner.name=dscmr", "learner={name: dscmr}"])
def test_naming_the_default_learner_keeps_options_given_without_a_name(again):
    assert resolve(override(FILE, [again])).model_dump()["learner"]["hidden"] == 64


@pytest.mark.parametrize("other", ["strategy=fedavg", "strategy.name=fedavg", "strategy={name: fedavg}"])
def test_another_strategy_starts_anew(other):
    strategy = resolve(override(FILE, [other])).strategy
    assert (strategy.share, strategy.gamma) == ("trainable", 0.5)


def test_options_reach_into_a_section_named_by_a_bare_string():
    assert resolve(override({"strategy": "fedprox"}, ["strategy.mu=0.5"])).strategy.mu == 0.5
    assert resolve(merged({"strategy": "fedprox"}, {"strategy": {"mu": 0.5}})).strategy.name == "fedprox"


def test_one_option_of_the_optimiser_leaves_the_others():
    options = resolve(override(FILE, ["learner.optimizer.name=sgd"])).model_dump()["learner"]["optimizer"]
    assert (options["name"], options["lr"]) == ("sgd", 0.01)


def test_assignments_add_up():
    config = resolve(override({}, ["strategy=fedprox", "strategy.mu=0.3", "strategy.server_step=2"]))
    assert (config.strategy.mu, config.strategy.server_step, config.strategy.merge) == (0.3, 2.0, "replace")


def test_a_resolved_configuration_resolves_to_itself():
    assignments = ["dataset=synthetic", "dataset.modalities={a: 2, b: 3}", "strategy.share=[common.*]"]
    config = resolve(override({}, [*assignments, "learner.lambda=3", "dataset.scaling={a: none}"]))
    assert Config.from_yaml(config.to_yaml()) == config
    assert config.model_dump()["learner"]["lambda"] == 3


def test_no_number_is_infinite_or_not_a_number():
    for assignment in ("strategy.gamma=.nan", "learner.eta=.inf", "federation.deadline=.inf", "partition.alpha=.nan"):
        with pytest.raises(InputError, match=assignment.partition("=")[0]):
            resolve(override({}, [assignment]))


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "On", "NO", "trueish", "falsetto"])
def test_on_off_yes_and_no_are_words(word):
    assert parse_yaml(f"{word}: {word}", "a file") == {word: word}


@pytest.mark.parametrize("truth", ["true", "True", "TRUE"])
def test_true_and_false_are_booleans(truth):
    assert parse_yaml(f"key: {truth}", "a file") == {"key": True}
    assert parse_yaml("key: false", "a file") == {"key": False}


def test_what_is_measured_on_needs_no_quotes():
    assert Config.from_yaml("evaluation: {on: all-test}").evaluation.on == "all-test"
    assert resolve(override({}, ["evaluation={on: all-test}"])).evaluation.on == "all-test"
    config = Config.from_yaml("evaluation: {on: all-test}")
    assert Config.from_yaml(config.to_yaml()) == config


def test_a_switch_still_takes_yes_and_no():
    assert Config.from_yaml("federation: {tolerate_failures: yes}").federation.tolerate_failures is True
    assert resolve(override({}, ["learner.shuffle=off"])).model_dump()["learner"]["shuffle"] is False


@pytest.mark.parametrize(
    ("text", "says"),
    [("seed: 1\nlearner: drsl\nseed: 2", "the key 'seed' twice"), ("dataset: " + "[" * 3000, "not YAML")],
)
def test_yaml_that_says_a_thing_twice_or_nests_without_end_is_one_line(text, says):
    with pytest.raises(InputError, match=says):
        parse_yaml(text, "a file")


def test_what_is_merged_in_is_not_said_twice():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "a file")["b"] == {"x": 3, "y": 2}
