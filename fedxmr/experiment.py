"""An experiment: methods tuned on validation with equal effort, then run over several seeds.

An experiment is a configuration file with one section more, which `simulate --config` leaves alone:

    experiment:
      seeds: 5                      # 0, 1, ... of the reported runs
      reference: fedcmr             # the method others are compared with
      tuning_seeds: [100]           # of the trials; never among the reported
      methods:
        fedcmr: {set: {strategy: fedcmr}, grid: {strategy.gamma: [-0.5, 0.5, 1.0]}}
        local:  {set: {strategy: local},  grid: {federation.epochs: [1, 2, 4]}}
      published: ...                # the numbers it answers to; shown, never compared by code
      departures: [...]             # what differs from where they come from
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from rich.progress import Progress

from fedxmr.commands import QUIET
from fedxmr.config import Config, merged, nested, one_line, read_yaml, resolve
from fedxmr.errors import FederationError, InputError
from fedxmr.recording import read_lines


class Method(BaseModel):
    """One row of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    set: dict[str, Any] = Field(default_factory=dict, description="configuration on top of the experiment's")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="dotted key -> values tried on validation")

    def trials(self) -> list[dict[str, Any]]:
        """Every combination of the grid, as dotted key -> value."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Plan(BaseModel):
    """The `experiment` section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: dict[str, Method] = Field(min_length=1)
    seeds: PositiveInt = 5
    reference: str | None = Field(None, description="the method others are compared with; null: the first")
    tuning_seeds: list[int] = [100]
    published: dict[str, Any] = Field(default_factory=dict)
    departures: list[str] = []

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reference is not None and self.reference not in self.methods:
            raise ValueError(f"reference: expected one of {', '.join(self.methods)}, got {self.reference!r}")
        if len({len(method.trials()) for method in self.methods.values()}) > 1:
            counts = ", ".join(f"{name} {len(method.trials())}" for name, method in self.methods.items())
            raise ValueError(f"methods: expected the same number of validation trials for every one, got {counts}")
        if set(self.tuning_seeds) & set(range(self.seeds)):
            raise ValueError(f"tuning_seeds: {self.tuning_seeds} are among the reported seeds 0 to {self.seeds - 1}")
        return self


def read_experiment(path: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan and the base configuration in a file. Raises InputError, also for a method that is no configuration."""
    base = read_yaml(path)
    section = base.pop("experiment", None)
    if section is None:
        raise InputError(f"{path}: has no section 'experiment'; `fedxmr.simulate --config` runs it")
    try:
        plan = Plan.model_validate(section)
    except ValidationError as error:
        raise InputError(f"{path}: {one_line(error, Plan, ['experiment'])}") from error
    for name, method in plan.methods.items():
        for trial in method.trials():
            try:
                configured(base, method, trial, 0)
            except InputError as error:
                raise InputError(f"{path}: method {name}: {error}") from error
    return plan, base


def configured(base: Mapping[str, Any], method: Method, trial: Mapping[str, Any], seed: int) -> Config:
    """The configuration of one run."""
    tree = merged(merged(base, method.set), {"seed": seed})
    for key, value in trial.items():
        tree = merged(tree, nested(key, value))
    return resolve(tree)


@dataclass(frozen=True)
class Run:
    """A run that has ended: what it was, and its folder."""

    config: Config
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return dict(json.loads((self.folder / "summary.json").read_text()))

    @property
    def retrieval(self) -> dict[str, Any]:
        """retrieval.json."""
        return dict(json.loads((self.folder / "retrieval.json").read_text()))

    @property
    def environment(self) -> dict[str, Any]:
        """environment.json."""
        return dict(json.loads((self.folder / "environment.json").read_text()))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")


@dataclass(frozen=True)
class Results:
    """chosen: method -> the trial picked on validation. runs: method -> its runs by seed.

    tried: method -> per trial its mean validation mAP over the tuning seeds; empty where there was one choice only.
    """

    chosen: Mapping[str, Mapping[str, Any]]
    tried: Mapping[str, Sequence[tuple[Mapping[str, Any], float]]]
    runs: Mapping[str, Sequence[Run]]


def conduct(plan: Plan, base: Mapping[str, Any], out: Path, workers: int) -> Results:
    """Tune every method on validation, then run every seed; runs that have ended already are not run again.

    workers: runs side by side, each with one thread. Raises FederationError for a run that fails.
    """
    tuning = {
        (name, i, seed): configured(base, method, trial, seed)
        for name, method in plan.methods.items()
        for i, trial in enumerate(method.trials())
        for seed in plan.tuning_seeds
        if len(method.trials()) > 1
    }
    done = _run_all(
        {out / "tuning" / name / f"{i}-seed{s}": c for (name, i, s), c in tuning.items()}, workers, "tuning"
    )
    tried: dict[str, list[tuple[Mapping[str, Any], float]]] = {}
    for name, method in plan.methods.items():
        for i, trial in enumerate(method.trials()):
            scores = [
                run.summary["validation"]["selected"]["mean"]["average"]
                for seed in plan.tuning_seeds
                if (run := done.get(out / "tuning" / name / f"{i}-seed{seed}"))
            ]
            tried.setdefault(name, []).append((trial, sum(scores) / len(scores) if scores else 0.0))
    chosen = {name: max(trials, key=lambda t: t[1])[0] for name, trials in tried.items()}
    final = {
        out / name / f"seed{seed}": configured(base, method, chosen[name], seed)
        for name, method in plan.methods.items()
        for seed in range(plan.seeds)
    }
    done = _run_all(final, workers, "runs")
    runs = {name: [done[out / name / f"seed{seed}"] for seed in range(plan.seeds)] for name in plan.methods}
    return Results(chosen, {n: t for n, t in tried.items() if len(t) > 1}, runs)


def _run_all(wanted: Mapping[Path, Config], workers: int, what: str) -> dict[Path, Run]:
    """Run what has not ended yet, some side by side. Raises FederationError for the first that fails."""
    missing = {folder: config for folder, config in wanted.items() if not _ended(folder, config)}
    with Progress() as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task(what, total=len(wanted), completed=len(wanted) - len(missing))
        try:
            for _ in pool.map(_run_one, missing, missing.values()):
                progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {folder: Run(config, folder) for folder, config in wanted.items()}


def _run_one(folder: Path, config: Config) -> None:
    """One run in a process of its own, with one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "fedxmr.simulate", "--config", str(file), "--threads", "1", "--no-pictures"]
    command += ["--out", str(folder), "--overwrite"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **QUIET})
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        why = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise FederationError(f"{folder}: {why.removeprefix('error: ')}")


def _ended(folder: Path, config: Config) -> bool:
    """Whether this very run has ended in this folder."""
    if not (folder / "summary.json").is_file() or not (folder / "retrieval.json").is_file():
        return False
    runtime = {"runtime": config.runtime}
    return resolve(read_yaml(folder / "config.yaml")).model_copy(update=runtime) == config
