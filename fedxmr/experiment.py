"""An experiment: methods tuned on validation with equal effort, then run over several seeds; or swept over values.

An experiment is a configuration file with two sections more, which `simulate --config` leaves alone:

    sweep:                          # optional: every method at every combination of these values
      strategy.alpha: [1, 5, 20]    # dotted key -> values
      seeds: 5                      # in place of the experiment's
    experiment:
      title: ...                    # the caption of its tables: what it answers to, and on which data
      seeds: 5                      # 0, 1, ... of the reported runs
      reference: fedcmr             # the method others are compared with
      tuning_seeds: [100]           # of the trials; never among the reported
      methods:
        fedcmr: {set: {strategy: fedcmr}, grid: {strategy.gamma: [-0.5, 0.5, 1.0]}}
        local:  {set: {strategy: local},  grid: {federation.epochs: [1, 2, 4]}}
      published:                    # printed beside ours, never compared by code
        source: ...                 # where these numbers stand, and how they were measured
        columns: [image->text, text->image, average]
        rows:                       # method, ours or another -> a number or null per column; or such a list per client
          fedcmr: [[0.480, 0.429, 0.455], [0.487, 0.454, 0.471], [0.463, 0.422, 0.443]]
      departures: [...]             # what differs from where they come from

In a sweep a method may say `sweep: false`: it is run once, as a level to compare with. Nothing is tuned in a sweep.
A file with `sweep` alone sweeps its own configuration.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from fedxmr.config import Config, merged, nested, one_line, override, read_yaml, resolve
from fedxmr.errors import InputError, unknown

SECTIONS = ("experiment", "sweep")
"""What an experiment's file has beyond a configuration."""

MAX_NAME = 100
"""Characters of a folder's name; file systems take 255 bytes."""

MAX_SEEDS = 1000

NOT_METHODS = ("", ".", "..", "tuning", "figures")
"""What no method may be called: an experiment's folder has these for something else."""

Trial = Mapping[str, Any]
"""Dotted key -> value."""

Numbers = list[float | None]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Method(_Section):
    """One row of the table, or one curve of a sweep."""

    set: dict[str, Any] = Field(default_factory=dict, description="configuration on top of the experiment's")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="dotted key -> values tried on validation")
    sweep: bool = Field(True, description="false: not swept, but run once as a level to compare with")

    def trials(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        return _combinations(self.grid)


class Published(_Section):
    """The numbers that an experiment answers to."""

    source: str
    columns: list[str] = Field([], description="names of scores: a direction, average, unseen average, fit seconds ...")
    rows: dict[str, Numbers | list[Numbers]] = Field({}, description="name -> a number per column, or that per client")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.rows:
            for numbers in self.by_client(name):
                if len(numbers) != len(self.columns):
                    raise ValueError(f"rows: expected {len(self.columns)} numbers for {name}, got {numbers}")
        return self

    def by_client(self, name: str) -> list[Numbers]:
        """The rows under a name: one, or one per client."""
        found = self.rows[name]
        return [row for row in found if isinstance(row, list)] or [[n for n in found if not isinstance(n, list)]]

    def mean(self, name: str, column: str) -> float | None:
        """A column's mean over the clients; None where a number or the column is missing."""
        if name not in self.rows or column not in self.columns:
            return None
        values = [row[self.columns.index(column)] for row in self.by_client(name)]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Row:
    """A row of the table: a method, at one point of the sweep."""

    method: str
    point: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        """Such as "fedcmr, alpha=20": of each key its last part, or all of it where two end alike."""
        ends = Counter(key.rpartition(".")[2] for key, _ in self.point)
        short = ((key.rpartition(".")[2], key, value) for key, value in self.point)
        return ", ".join([self.method, *(f"{end if ends[end] == 1 else key}={value}" for end, key, value in short)])

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return folder_name(self.label)

    def __hash__(self) -> int:
        return hash(self.label)  # a swept value may be a list


def folder_name(words: str) -> str:
    """Words as the name of a folder: a swept value may have a slash in it, or be a long list."""
    name = re.sub(r"[^\w .,=+-]", "_", words)
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


class Plan(_Section):
    """The `experiment` section, with the `sweep` beside it."""

    methods: dict[str, Method] = Field(min_length=1)
    title: str = ""
    seeds: int = Field(5, ge=1, le=MAX_SEEDS)
    reference: str | None = Field(None, description="the method others are compared with; null: the first")
    tuning_seeds: list[NonNegativeInt] = Field([100], min_length=1)
    published: Published | None = None
    departures: list[str] = []
    sweep: dict[str, list[Any]] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference: expected one of {', '.join(self.methods)}, got {self.reference!r}")
        if empty := [key for key, values in self.sweep.items() if not values]:
            raise ValueError(f"sweep: expected values of {empty[0]}, got none")
        if "seed" in {*self.sweep, *itertools.chain.from_iterable(method.grid for method in self.methods.values())}:
            raise ValueError("seed: is not varied by hand, expected seeds: how many runs of each")
        if self.sweep and (tuned := [name for name, method in self.methods.items() if method.grid]):
            raise ValueError(f"methods: nothing is tuned in a sweep, got a grid of {tuned[0]}")
        if self.sweep and not any(method.sweep for method in self.methods.values()):
            raise ValueError("methods: expected one that is swept, got sweep: false for all")
        if reserved := [name for name in self.methods if name in NOT_METHODS]:
            raise ValueError(f"methods: expected another name than {reserved[0]!r}")
        folders = Counter(row.folder for row in self.rows())
        if twice := [folder for folder, times in folders.items() if times > 1]:
            raise ValueError(f"methods: expected rows whose folders differ, got {twice[0]!r} more than once")
        counts = {name: len(method.trials()) for name, method in self.methods.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"methods: expected the same number of validation trials for every one, got {shown}")
        if min(counts.values()) == 0:
            raise ValueError("methods: expected values of every key of a grid, got none")
        if min(self.tuning_seeds) < self.seeds:
            raise ValueError(f"tuning_seeds: {self.tuning_seeds} are among the reported seeds 0 to {self.seeds - 1}")
        return self

    def rows(self) -> list[Row]:
        """The rows of the table: every method, and where it is swept every point of the sweep."""
        points = [tuple(point.items()) for point in _combinations(self.sweep)]
        return [Row(n, point) for n, method in self.methods.items() for point in (points if method.sweep else [()])]

    def reference_of(self, row: Row) -> Row | None:
        """What a row is compared with: the reference method, where it is swept at the same point; None for itself."""
        name = self.reference or next(iter(self.methods))
        against = Row(name, row.point if self.methods[name].sweep else ())
        return against if against != row and against in self.rows() else None

    def only(self, names: Sequence[str]) -> Plan:
        """The plan of some of its methods. Raises InputError for a name that is none of them."""
        for name in names:
            if name not in self.methods:
                raise unknown("method", name, self.methods)
        methods = {name: method for name, method in self.methods.items() if name in names}
        return self.model_copy(
            update={"methods": methods, "reference": self.reference if self.reference in methods else None}
        )


def read_experiment(path: Path, assignments: Sequence[str] = ()) -> tuple[Plan, dict[str, Any]]:
    """The plan and the base configuration in a file.

    assignments: `section.key=value`, laid over every method. Raises InputError, also for a method that is no
    configuration, and for an assignment of what is tuned or swept.
    """
    base = read_yaml(path)
    experiment, sweep = (base.pop(section, None) for section in SECTIONS)
    if experiment is None and sweep is None:
        raise InputError(f"{path}: has no section 'experiment' or 'sweep'; `fedxmr.simulate --config` runs it")
    try:
        plan = Plan.model_validate(_with_sweep(path, base, experiment, sweep))
    except ValidationError as error:
        raise InputError(f"{path}: {one_line(error, Plan, ['experiment'])}") from error
    if assignments:
        different = _configurations(path, plan, base)
        plan, base = _overridden(plan, base, assignments)
        if len(_configurations(path, plan, base)) < len(different):
            same = ", ".join(assignments)
            raise InputError(f"{path}: {same} makes methods the same that differ, expected another key")
    tasks: dict[str, str] = {}
    for row in plan.rows():
        method = plan.methods[row.method]
        for trial in method.trials():
            try:
                config = configured(base, method, {**trial, **dict(row.point)}, 0)
            except InputError as error:
                raise InputError(f"{path}: method {row.label}: {error}") from error
            if config.evaluation.every == 0:
                raise InputError(f"{path}: method {row.label}: evaluation.every: expected 1 or more to compare, got 0")
            tasks.setdefault(config.dataset.task, row.label)
    if len(tasks) > 1:
        got = " and ".join(f"{task} ({label})" for task, label in tasks.items())
        raise InputError(f"{path}: expected one dataset.task for all methods, got {got}")
    return plan, base


def _configurations(path: Path, plan: Plan, base: Mapping[str, Any]) -> set[str]:
    """The different configurations among the rows, untuned. Raises InputError for what is none."""
    found = set()
    for row in plan.rows():
        method = plan.methods[row.method]
        try:
            config = configured(base, method, dict(row.point), 0)
        except InputError as error:
            raise InputError(f"{path}: method {row.label}: {error}") from error
        found.add(config.experiment)
    return found


def _with_sweep(path: Path, base: Mapping[str, Any], experiment: Any, sweep: Any) -> dict[str, Any]:
    """The two sections as one."""
    for section, content in zip(SECTIONS, (experiment, sweep), strict=True):
        if content is not None and not isinstance(content, Mapping):
            raise InputError(f"{path}: {section}: expected keys and values, got {content!r}")
    if experiment is None:
        experiment = {"methods": {resolve(base).strategy.name: {}}}
    if "sweep" in experiment:
        raise InputError(f"{path}: sweep stands beside experiment, not in it")
    if sweep is None:
        return dict(experiment)
    keys = {key: values for key, values in sweep.items() if key != "seeds"}
    if not keys:
        raise InputError(f"{path}: sweep: expected dotted keys and their values, such as strategy.gamma: [0.5, 1.0]")
    seeds = {"seeds": sweep["seeds"]} if "seeds" in sweep else {}
    return {**experiment, **seeds, "sweep": keys}


def _overridden(plan: Plan, base: dict[str, Any], assignments: Sequence[str]) -> tuple[Plan, dict[str, Any]]:
    """Plan and base with assignments in every method."""
    varied = {key for method in plan.methods.values() for key in method.grid} | plan.sweep.keys() | {"seed"}
    for assignment in assignments:
        key = assignment.partition("=")[0]
        if key in varied:
            raise InputError(f"{assignment}: {key} is what the experiment varies, expected another key")
    methods = {
        name: method.model_copy(update={"set": override(method.set, assignments)})
        for name, method in plan.methods.items()
    }
    return plan.model_copy(update={"methods": methods}), override(base, assignments)


def configured(base: Mapping[str, Any], method: Method, trial: Trial, seed: int) -> Config:
    """The configuration of one run."""
    tree = merged(merged(base, method.set), {"seed": seed})
    for key, value in trial.items():
        tree = merged(tree, nested(key, value))
    return resolve(tree)


def _combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value for each key; of no keys the empty one."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
