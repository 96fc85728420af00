"""A learner from outside that is not one gets one line before anything runs."""

from __future__ import annotations

import sys

import pytest

from fedxmr import commands
from fedxmr.errors import InputError
from fedxmr.learners import learner_class
from fedxmr.setting import check
from fedxmr.simulate import simulate
from fedxmr.sources import dataset
from tests.federations import TOY, configured, federate
from tests.toy import Toy


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported as `outside`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> None:
        (tmp_path / "outside.py").write_text(text)
        sys.modules.pop("outside", None)

    yield write
    sys.modules.pop("outside", None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def (", "got SyntaxError: "),
        ("1 / 0", "got ZeroDivisionError: division by zero (outside.py:1)"),
        ("raise SystemExit(0)", "got SystemExit: 0 (outside.py:1)"),
        ("X = 3", "it lacks Config"),
        ("from tests.toy import Toy\nclass X(Toy): Config = {}", "expected Config to be a pydantic model, got {}"),
        ("from tests.toy import Toy\nclass X: Config, fit, owned = Toy.Config, Toy.fit, Toy.owned", "it lacks encode"),
    ],
)
def test_what_is_no_learner_gets_one_line(module, capsys, tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    module(text)
    assert commands.run(simulate, ["--learner", "outside:X", "--dataset", "digits"]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


class Raises(Toy):
    def __init__(self, *_):
        raise KeyError("hidden")


class NotAFrozenset(Toy):
    common = ("shared.w",)


class NotInState(Toy):
    common = frozenset({"nope.weight"})


class NotTrainable(Toy):
    trainable = frozenset({"private.v"})


class NotByClass(Toy):
    by_class = frozenset({"private.v"})


class NoTensors(Toy):
    def state(self, names=None):
        return dict.fromkeys(super().state(names), 3.0)


class Remarks(Toy):
    @classmethod
    def remarks(cls, config, spec):
        raise ValueError("no remark")


class Scales(Toy):
    scaling = {"standardise": "whiten"}  # noqa: RUF012


@pytest.mark.parametrize(
    ("learner", "says"),
    [
        (Raises, r"cannot be built as configured: KeyError: 'hidden' \(test_outside_learners.py:"),
        (NotAFrozenset, "expected common to be a frozenset of names, got tuple"),
        (NotInState, "expected common to be names of its state, got nope.weight"),
        (NotTrainable, "expected common to be trainable, got shared.w"),
        (NotByClass, "expected private.v, which is by class, to have 3 rows, got"),
        (NoTensors, r"expected state\(\) to be tensors by name, got dict"),
        (
            Scales,
            "expected scaling to be a mapping to standardise, isotropic, norm, none, got {'standardise': 'whiten'}",
        ),
        (Remarks, "ValueError: no remark"),
    ],
)
def test_a_learner_whose_parts_do_not_fit_is_refused_before_the_run(learner, says):
    config = configured(f"learner.name={__name__}:{learner.__name__}", base=TOY)
    with pytest.raises(InputError, match=says):
        check(config, dataset(config))


class ChangesInEncode(Toy):
    def encode(self, modality, x):
        encoded = super().encode(modality, x)
        x.zero_()
        return encoded


class ChangesInFit(Toy):
    def fit(self, data, epochs, rng, proximal=None):
        data.features["text"].mul_(2)
        return super().fit(data, epochs, rng, proximal)


@pytest.mark.parametrize(("learner", "where"), [(ChangesInEncode, "encode"), (ChangesInFit, "fit")])
def test_a_learner_that_changes_its_items_fails(tmp_path, learner, where):
    with pytest.raises(Exception, match=f"the learner's {where} changed the items that it was given"):
        federate(tmp_path / "run", f"learner.name={__name__}:{learner.__name__}", base=TOY)


def test_a_sound_one_is_found():
    assert learner_class("tests.toy:Toy") is Toy
