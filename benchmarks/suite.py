"""The benchmarks. Each gives what it measured; `python -m benchmarks` names them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks import environments, jobs
from benchmarks.drawing import draw_scale
from benchmarks.references.job import Job
from benchmarks.timing import Command, Measured, Ran, in_turn
from fedxmr.commands import SWIFT
from fedxmr.machine import cores
from fedxmr.metrics import mean_average_precision, tie_order
from fedxmr.recording import read_json, read_lines

PLAIN = dict.fromkeys(SWIFT)
"""The environment without what fedxmr sets for torch: as torch is by itself."""

SIZES = (10, 100, 1000, 10_000)
"""Clients that are registered."""


@dataclass(frozen=True)
class Plan:
    """How much is measured. turns: how often. rounds: of the longest job. scratch: a folder for files."""

    turns: int
    rounds: int
    scratch: Path

    @property
    def fewer(self) -> int:
        """Rounds of other jobs of the paper's size."""
        return max(2, self.rounds // 4)

    def paper(self, strategy: str, rounds: int) -> Path:
        """FedCMR's networks on as many pairs as Wikipedia has, three clients: the job's file."""
        return jobs.prepare(
            self.scratch,
            f"paper-{strategy}",
            dims=(4096, 1024),
            items=(2173, 231, 462),
            clients=3,
            rounds=rounds,
            epochs=2,
            batch_size=100,
            hidden=2048,
            width=1024,
            strategy=strategy,
            threads=cores(),
        )

    def many(self) -> Path:
        """1000 clients with ten pairs each, ten of them in a round: the job's file."""
        return jobs.prepare(
            self.scratch,
            "many",
            dims=(128, 64),
            items=(10_000, 250, 250),
            clients=1000,
            sample=10,
            rounds=100,
            epochs=2,
            batch_size=10,
            hidden=64,
            width=32,
            strategy="fedcmr",
            evaluate_every=0,
            threads=1,
        )


def fedxmr(plan: Plan, job: Path, engine: str, *more: str) -> Command:
    """fedxmr at a job."""
    config = job.with_name("config.yaml")
    config.write_text(jobs.as_config(Job.read(job)).to_yaml(), encoding="utf-8")
    return simulate(plan, "--config", config, "--engine", engine, *more)


def simulate(plan: Plan, *options: object) -> Command:
    """A simulation, whose run folder is written anew each time."""
    out = ("--out", plan.scratch / "run", "--overwrite", "--no-pictures")
    return Command(["-m", "fedxmr.simulate", *options, *out])


def reference(name: str, job: Path, environment: Mapping[str, str | None]) -> Command:
    """A reference program at a job."""
    return Command(["-m", f"benchmarks.references.{name}", job], environment=environment)


def bare(plan: Plan) -> Iterator[Measured]:
    """FedCMR with both engines against a plain loop, at the paper's widths, start-up and report included."""
    job = plan.paper("fedcmr", plan.rounds)
    ran = in_turn(
        {
            "local": fedxmr(plan, job, "local"),
            "checkpoints": fedxmr(plan, job, "local", "federation.checkpoint_every=5"),
            "ray": fedxmr(plan, job, "ray"),
            "bare": reference("bare", job, SWIFT),
            "plain": reference("bare", job, PLAIN),
        },
        plan.turns,
    )
    yield Measured.ratio("local / bare loop", "<= 1.05", ran["local"], ran["bare"])
    yield Measured.ratio("local with checkpoints / bare loop", "<= 1.10", ran["checkpoints"], ran["bare"])
    yield Measured.ratio("ray / bare loop", "<= 1.3", ran["ray"], ran["bare"])
    yield Measured.ratio("local / bare loop with torch as it is by itself", "<= 1.05", ran["local"], ran["plain"])


def fedavg(plan: Plan) -> Iterator[Measured]:
    """FedAvg, which moves six times as much as FedCMR, against a plain loop; and with products in bfloat16."""
    job = plan.paper("fedavg", plan.fewer)
    ran = in_turn(
        {
            "local": fedxmr(plan, job, "local"),
            "bfloat16": fedxmr(plan, job, "local", "--precision", "bfloat16"),
            "bare": reference("bare", job, SWIFT),
        },
        plan.turns,
    )
    yield Measured.ratio("local / bare loop", "<= 1.05", ran["local"], ran["bare"])
    yield Measured.ratio("local in bfloat16 / in float32", "", ran["bfloat16"], ran["local"])


def flower(plan: Plan) -> Iterator[Measured]:
    """FedAvg with the local engine against Flower's own simulation of the same job."""
    job = plan.paper("fedavg", plan.fewer)
    programs = {"local": fedxmr(plan, job, "local"), "flower": reference("flower_simulation", job, SWIFT)}
    ran = in_turn(programs, plan.turns)
    yield Measured.ratio("local / Flower's simulation", "< 1", ran["local"], ran["flower"])


def pfl(plan: Plan) -> Iterator[Measured]:
    """FedAvg with the local engine against pfl-research, which is installed into an environment of its own."""
    job = plan.paper("fedavg", plan.fewer)
    other = Command(["-m", "benchmarks.references.pfl_fedavg", job], environments.pfl(), SWIFT)
    ran = in_turn({"local": fedxmr(plan, job, "local"), "pfl": other}, plan.turns)
    yield Measured.ratio("local / pfl-research", "", ran["local"], ran["pfl"])


def many(plan: Plan) -> Iterator[Measured]:
    """What it costs a client-round to be one of fedxmr's, with many clients that have little to do."""
    job = plan.many()
    engines = {"local": fedxmr(plan, job, "local"), "ray": fedxmr(plan, job, "ray", "--workers", "2")}
    ran = in_turn({**engines, "bare": reference("bare", job, SWIFT)}, plan.turns)
    client_rounds = Job.read(job).rounds * 10
    for engine, goal in (("local", "<= 10 ms"), ("ray", "<= 25 ms")):
        apart = [1000 * (a.seconds - b.seconds) / client_rounds for a, b in zip(ran[engine], ran["bare"], strict=True)]
        yield Measured(
            f"1000 clients, 10 sampled, {engine}: more than a bare loop, per client-round", goal, apart, "ms"
        )


def noop(plan: Plan) -> Iterator[Measured]:
    """Rounds in which three clients do nothing: runs of two lengths, so that the start does not count."""
    few, lots = 100, 600
    options = ("--clients", 3, "--evaluate-every", 0, "--threads", 1, "federation.checkpoint_every=0")
    learner = "learner.name=benchmarks.learners:NoOp"
    for engine, goal in (("local", "<= 2 ms"), ("ray", "<= 10 ms")):
        commands = {str(n): simulate(plan, *options, learner, "--engine", engine, "--rounds", n) for n in (few, lots)}
        ran = in_turn(commands, plan.turns)
        pairs = zip(ran[str(few)], ran[str(lots)], strict=True)
        per_round = [1000 * (b.seconds - a.seconds) / (lots - few) for a, b in pairs]
        yield Measured(f"a round in which 3 clients do nothing, {engine}", goal, per_round, "ms")


def metric(plan: Plan) -> Iterator[Measured]:
    """mAP of 5000 queries and a gallery of 5000 against the matrix product in it, in this process."""
    torch.set_num_threads(cores())
    rng = torch.Generator().manual_seed(0)
    query, gallery = (torch.nn.functional.normalize(torch.randn(5000, 1024, generator=rng)) for _ in range(2))
    labels = torch.eye(10, dtype=torch.bool)[torch.randint(10, (5000,), generator=rng)]
    order = tie_order(5000, rng)

    def product() -> object:
        return query @ gallery.T

    def measured() -> object:
        return mean_average_precision(lambda rows: query[rows] @ gallery.T, labels, labels, order=order)

    times = [(_seconds(measured), _seconds(product)) for _ in range(max(plan.turns, 5) + 1)][1:]
    ours, other = zip(*times, strict=True)
    ratios = [a / b for a, b in times]
    yield Measured("mAP of 5000 x 5000, width 1024 / its matrix product", "<= 2.0", ratios, "x", ours, other)


def start(plan: Plan) -> Iterator[Measured]:
    """How soon a command answers, and how soon it trains."""
    help_ = Command(["-m", "fedxmr.simulate", "--help"])
    options = ("--clients", 3, "--rounds", 1, "learner.name=benchmarks.learners:Stopwatch", "--engine", "local")
    ran = in_turn({"help": help_, "step": simulate(plan, *options)}, max(plan.turns, 5))
    yield Measured("--help", "<= 0.3 s", [r.seconds for r in ran["help"]], "s")
    steps = [float(_said(r, r"first step after ([\d.]+) s")) for r in ran["step"]]
    yield Measured("first training step after the command starts, local", "<= 2 s", steps, "s")


def scale(plan: Plan) -> Iterator[Measured]:
    """Ever more clients that are registered, ten pairs each, 50 of them in a round: memory and time of a round."""
    rounds, peaks, seconds = 20, {}, {}
    for clients in SIZES:
        sample = min(50, clients)
        size = (f"dataset.items={10 * clients}", "dataset.validation_items=100", "dataset.test_items=100")
        options = ("--dataset", "synthetic", *size, "--clients", clients, "--sample", sample, "--rounds", rounds)
        small = ("learner.hidden=64", "learner.width=32", "--engine", "local", "--threads", cores())
        ran = [simulate(plan, *options, *small).run() for _ in range(plan.turns)]
        peaks[clients] = [r.peak_bytes / 2**20 for r in ran]
        seconds[clients] = _later_rounds(plan.scratch / "run", sample)
        of = f"{clients} clients, {sample} sampled: "
        yield Measured(f"{of}all memory", "< 2000 MiB" if clients == max(SIZES) else "", peaks[clients], "MiB")
        whole = [r.seconds for r in ran]
        yield Measured(f"{of}the whole run of {rounds} rounds", "", whole, "s")
        goal = "as with 100" if sample == 50 else ""
        yield Measured(f"{of}a round, per client of it", goal, [1000 * t for t in seconds[clients]], "ms")
    draw_scale(plan.scratch / "scale.png", peaks, seconds)


def store(plan: Plan) -> Iterator[Measured]:
    """What a client costs that has trained: memory where it stays alive, and where files hold it."""
    common, others = (512 + 1) * 256, (256 + 1) * 512 + (128 + 1) * 512 + (256 + 1) * 10
    data = ("--dataset", "synthetic", 'dataset.modalities={"image": 256, "text": 128}', "dataset.items=4000")
    options = (*data, "--clients", 400, "--sample", 10, "--evaluate-every", 0, "--engine", "local", "--threads", 1)
    for strategy, waiting in (("fedavg", 0), ("fedcmr", common)):
        state = 4 * (3 * (common + others) + waiting)  # weights, two moments, and FedCMR's W_0
        for what, budget in (("alive", "8GB"), ("in files", "1")):
            each, all_ = [], []
            for _ in range(plan.turns):
                ended = []
                for rounds in (3, 40):
                    budgeted = ("--strategy", strategy, "--rounds", rounds, "--memory-budget", budget)
                    ran = simulate(plan, *options, *budgeted, "federation.checkpoint_every=0").run()
                    ended.append((_trained(plan.scratch / "run"), ran.peak_bytes))
                (few, at_first), (lots, later) = ended
                all_.append((later - at_first) / 2**20)
                each.append((later - at_first) / (lots - few) / state)
            of = f"{strategy}: memory of clients that have trained, {what}"
            if what == "alive":
                yield Measured(f"{of}, each / its state of {state / 1e6:.1f} MB", "<= 1.05", each)
            else:
                yield Measured(f"{of}, all {lots - few}", "<= 5 MB", all_, "MiB")


BENCHMARKS: Mapping[str, Callable[[Plan], Iterator[Measured]]] = {
    "start": start,
    "metric": metric,
    "noop": noop,
    "many": many,
    "scale": scale,
    "store": store,
    "bare": bare,
    "fedavg": fedavg,
    "flower": flower,
    "pfl": pfl,
}
OPTIONAL = frozenset({"pfl"})
"""Not run unless they are named: they install what they compare with."""


def _later_rounds(out: Path, sample: int) -> list[float]:
    """The driver's seconds of each round but the first, per client of the round, states not counted."""
    lines = [line for line in read_lines(out / "timings.jsonl") if "client" not in line]
    totals = [sum(spent for part, spent in line["seconds"].items() if part != "state") for line in lines]
    return [(b - a) / sample for a, b in pairwise(totals)]


def _trained(out: Path) -> int:
    """How many clients have taken part in a run."""
    participation: Mapping[str, list[int]] = read_json(out / "summary.json")["participation"]
    return len(set().union(*participation.values()))


def _said(ran: Ran, pattern: str) -> str:
    found = re.search(pattern, ran.said)
    assert found, f"expected {pattern} in:\n{ran.said}"
    return found[1]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
