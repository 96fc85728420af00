"""Carrying out an experiment: runs side by side, each in a process of its own; what has ended is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from rich.progress import Progress

from fedxmr.checkpoint import rounds
from fedxmr.commands import BAD_INPUT, INTERRUPTED, QUIET
from fedxmr.config import Config, read_yaml, resolve
from fedxmr.errors import FederationError, InputError, one_line
from fedxmr.experiment import Plan, Row, Trial, configured
from fedxmr.recording import claimed, read_lines
from fedxmr.state import load
from fedxmr.types import State


@dataclass(frozen=True)
class Run:
    """A run that has ended: what it was, and its folder."""

    config: Config
    folder: Path

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return self._json("summary.json")

    @cached_property
    def retrieval(self) -> dict[str, Any]:
        """retrieval.json."""
        return self._json("retrieval.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json."""
        return self._json("environment.json")

    @property
    def precisions(self) -> State:
        """ "<client>/<direction>" -> [n] the average precision of each test item as a query; NaN where it is none."""
        return load(self.folder / "precisions.safetensors")[0]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    def _json(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Results:
    """chosen: method with a grid -> the trial picked on validation. runs: row of the table -> its runs by seed.

    tried: method -> per trial its mean validation mAP over the tuning seeds; empty where there was one choice only.
    """

    chosen: Mapping[str, Trial]
    tried: Mapping[str, Sequence[tuple[Trial, float]]]
    runs: Mapping[Row, Sequence[Run]]


def conduct(plan: Plan, base: Mapping[str, Any], out: Path, workers: int) -> Results:
    """Tune every method on validation, then run every row at every seed.

    workers: runs side by side, each with one thread. Raises FederationError for a run that fails, and InputError for a
    folder that cannot be used, or that another process uses.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: expected a folder for the runs, got {one_line(error)}") from error
    with claimed(out):
        return _conduct(plan, base, out, workers)


def _conduct(plan: Plan, base: Mapping[str, Any], out: Path, workers: int) -> Results:
    tried = _tune(plan, base, out / "tuning", workers)
    chosen: dict[str, Trial] = {name: method.trials()[0] for name, method in plan.methods.items() if method.grid}
    chosen |= {name: max(trials, key=lambda t: t[1])[0] for name, trials in tried.items()}
    wanted = {
        (row, seed): configured(base, plan.methods[row.method], {**chosen.get(row.method, {}), **dict(row.point)}, seed)
        for row in plan.rows()
        for seed in range(plan.seeds)
    }
    folders = {(row, seed): out / row.folder / f"seed{seed}" for row, seed in wanted}
    done = _run_all({folders[key]: config for key, config in wanted.items()}, workers, "runs")
    runs = {row: [done[folders[row, seed]] for seed in range(plan.seeds)] for row in plan.rows()}
    return Results(chosen, tried, runs)


def _tune(plan: Plan, base: Mapping[str, Any], out: Path, workers: int) -> dict[str, list[tuple[Trial, float]]]:
    """Method -> its trials and their validation mAP, of methods with a choice."""
    trials = {name: method.trials() for name, method in plan.methods.items() if len(method.trials()) > 1}
    folders = {
        (name, i, seed): out / Row(name).folder / f"{i}-seed{seed}"
        for name, own in trials.items()
        for i in range(len(own))
        for seed in plan.tuning_seeds
    }
    wanted = {
        folder: configured(base, plan.methods[name], trials[name][i], seed)
        for (name, i, seed), folder in folders.items()
    }
    done = _run_all(wanted, workers, "tuning") if wanted else {}

    def score(name: str, i: int) -> float:
        found = [done[folders[name, i, seed]].summary["validation"]["selected"]["mean"] for seed in plan.tuning_seeds]
        return fmean(mean["average"] for mean in found)

    return {name: [(trial, score(name, i)) for i, trial in enumerate(own)] for name, own in trials.items()}


def _run_all(wanted: Mapping[Path, Config], workers: int, what: str) -> dict[Path, Run]:
    """Run what has not ended yet, some side by side. Raises FederationError for the first that fails."""
    missing = {folder: config for folder, config in wanted.items() if not _ended(folder, config)}
    processes = Processes()
    with Progress() as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task(what, total=len(wanted), completed=len(wanted) - len(missing))
        try:
            for _ in pool.map(partial(_run_one, processes), missing, missing.values()):
                progress.advance(task)
        except BaseException:
            processes.end()  # they go on from their checkpoints later
            pool.shutdown(cancel_futures=True)
            raise
    return {folder: Run(config, folder) for folder, config in wanted.items()}


class Processes:
    """The runs at work, to be ended together."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._lock = Lock()

    def simulate(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Run `fedxmr.simulate`: its exit code, and why it failed where it did."""
        command = [sys.executable, "-m", "fedxmr.simulate", *arguments, "--no-pictures"]
        with self._lock:
            if self._ended:
                return INTERRUPTED, "ended with the others"
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **QUIET},
            )
            self._running.add(process)
        _, said = process.communicate()
        with self._lock:
            self._running.discard(process)
        lines = said.strip().splitlines() or ["no message"]
        why = next((line for line in lines if line.startswith("error: ")), lines[-1])
        return process.returncode, why.removeprefix("error: ")

    def end(self) -> None:
        """End those at work, as SIGTERM does, and start no others."""
        with self._lock:
            self._ended = True
            for process in self._running:
                process.terminate()


def _run_one(processes: Processes, folder: Path, config: Config) -> None:
    """One run in a process of its own, with one thread; from its checkpoint where it has one that can be gone on from.

    Raises FederationError with the reason it gives.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    code, why = BAD_INPUT, ""
    if _is_of(folder, config) and rounds(folder):
        code, why = processes.simulate(["--resume", str(folder)])
    if code == BAD_INPUT:  # nothing to go on from, or a resume that is refused
        file = folder.with_name(f"{folder.name}.yaml")
        file.write_text(config.to_yaml(), encoding="utf-8")
        # several runs share this machine and its GPU, so each is one process
        engine = [] if config.runtime.engine != "auto" or config.runtime.only_ray else ["--engine", "local"]
        arguments = ["--config", str(file), "--threads", "1", *engine, "--out", str(folder), "--overwrite"]
        code, why = processes.simulate(arguments)
    if code:
        raise FederationError(f"{folder}: {why}")


def _ended(folder: Path, config: Config) -> bool:
    """Whether this very run has ended in this folder, with nothing of its results damaged."""
    run = Run(config, folder)
    try:
        whole = "test" in run.summary and "clients" in run.retrieval and "commit" in run.environment
        return whole and bool(run.precisions) and bool(run.metrics()) and _is_of(folder, config)
    except (OSError, ValueError, InputError):
        return False


def _is_of(folder: Path, config: Config) -> bool:
    """Whether a folder is of a run with this configuration, wherever it ran."""
    try:
        before = resolve(read_yaml(folder / "config.yaml"))
    except InputError:
        return False
    return before.model_copy(update={"runtime": config.runtime}) == config
