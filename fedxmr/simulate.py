"""`python -m fedxmr.simulate`: a whole federation on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fedxmr import commands
from fedxmr.commands import configure, option, say
from fedxmr.errors import InputError

if TYPE_CHECKING:
    from fedxmr.config import Config
    from fedxmr.data import Dataset


def simulate(
    assignments: commands.Assignments = None,
    config: commands.ConfigFile = None,
    method: commands.MethodName = None,
    dataset: commands.DatasetName = None,
    task: commands.Task = None,
    features: commands.Features = None,
    data_dir: commands.DataDir = None,
    clients: commands.Clients = None,
    sample: Annotated[int | None, option("clients per round, drawn from (seed, round); default: all")] = None,
    partition: commands.PartitionScheme = None,
    strategy: Annotated[str | None, option("fedcmr (default), fedavg, fedprox or local")] = None,
    learner: commands.LearnerName = None,
    rounds: commands.Rounds = None,
    seed: commands.Seed = None,
    protocol: commands.Protocol = None,
    evaluate_every: commands.EvaluateEvery = None,
    evaluate_clients: Annotated[int | None, option("evaluate at most so many clients, a seeded panel")] = None,
    evaluate_on: commands.EvaluateOnPart = None,
    engine: commands.Engine = None,
    threads: commands.Threads = None,
    precision: commands.Precision = None,
    device: commands.Device = None,
    memory_budget: commands.MemoryBudget = None,
    workers: commands.Workers = None,
    cpus_per_client: commands.CpusPerClient = None,
    gpus_per_client: commands.GpusPerClient = None,
    ray_address: commands.RayAddress = None,
    tolerate_failures: Annotated[
        bool | None, option("go on without a client that fails, is late or is rejected", "--tolerate-failures")
    ] = None,
    dropout: Annotated[
        float | None, option("chance that a client of a round is out of reach in it, from 0 to below 1, seeded")
    ] = None,
    deadline: Annotated[
        float | None,
        option(
            "seconds a client has to answer a message, default 600; later it has failed. ray ends it then, local can "
            "only wait for it and not count its answer"
        ),
    ] = None,
    pictures: commands.Pictures = True,
    examples: commands.Examples = 0,
    out: commands.Out = None,
    overwrite: commands.Overwrite = False,
    resume: commands.Resume = None,
) -> None:
    """Simulate a federation: every client trains on its own items and shares what the strategy says.

    Later settings win: defaults, the strategy's preset, --config, options, KEY=VALUE. With --resume they start from the
    run folder's own configuration, of which only federation.rounds may change.
    """
    options = {
        "dataset.name": dataset,
        "dataset.task": task,
        "dataset.features": features,
        "dataset.data_dir": data_dir,
        "federation.clients": clients,
        "federation.sample": sample,
        "federation.rounds": rounds,
        "federation.precision": precision,
        "federation.tolerate_failures": tolerate_failures,
        "federation.dropout": dropout,
        "federation.deadline": deadline,
        "partition.scheme": partition,
        "strategy.name": strategy,
        "learner.name": learner,
        "seed": seed,
        "evaluation.protocol": protocol,
        "evaluation.every": evaluate_every,
        "evaluation.clients": evaluate_clients,
        "evaluation.on": evaluate_on,
        "runtime.engine": engine,
        "runtime.threads": threads,
        "runtime.device": device,
        "runtime.memory_budget": memory_budget,
        "runtime.workers": workers,
        "runtime.cpus_per_client": cpus_per_client,
        "runtime.gpus_per_client": gpus_per_client,
        "runtime.ray_address": ray_address,
    }
    checked = configure(config, options, assignments, method, resume)
    run(checked, out, overwrite=overwrite, resume=resume, pictures=pictures, examples=examples)


def run(
    config: Config,
    out: Path | None,
    *,
    overwrite: bool = False,
    resume: Path | None = None,
    pictures: bool = True,
    examples: int = 0,
) -> dict[str, Any]:
    """Check, run and report; returns the summary. Nothing is written before all that can be checked has been.

    out: the run folder; None: a new one in runs/. resume: a run folder to go on with, in place of out.
    examples: how much of the gallery a page of examples shows per query; 0: no page.
    Raises InputError, FederationError.
    """
    from fedxmr.timing import clock

    clock.reset()
    with clock.part("start_up"):
        from fedxmr import engines, recording, sources
        from fedxmr.report import report
        from fedxmr.setting import check, remarks
        from server.app import app as server

        if resume and (out or overwrite):
            raise InputError("--resume: goes on in its own run folder, expected neither --out nor --overwrite")
        data = sources.dataset(config)
        parts = sources.parts(config)
        check(config, data)
        if examples:
            data.looks()  # bad files are to be found before the run
        engine = engines.choose(config.runtime)
        engine.check(config)
        out = resume or out or _free_folder(config)
        ended = resume is not None and recording.reopen(out, config, data, parts)
        if not resume:
            recording.prepare(out, config, data, parts, overwrite)
    say(f"{_headline(config)}, engine {engine}")
    say(f"features: {_scaling(config, data)}\nrun folder: {out}")
    for remark in (*remarks(config, data), *engine.remarks(config), *_foreseen(config)):
        say(f"warning: {remark}")
    run_config = {"config": config.to_yaml(), "out": str(out.resolve()), "resume": resume is not None}
    with recording.claimed(out):
        try:
            if not ended:
                engine.run(server, "clients.app:app", config, run_config)
            return report(config, data, out, pictures=pictures, examples=examples)
        except BaseException as error:
            begun = resume is not None or (out / "metrics.jsonl").exists()
            if isinstance(error, InputError) and not begun:  # nothing is lost
                shutil.rmtree(out, ignore_errors=True)
                raise
            error.add_note(recording.outlook(out, config))
            raise


def _scaling(config: Config, data: Dataset) -> str:
    """How the features are scaled, and what the data set recommends where that is something else."""
    from fedxmr.sources import scaling

    def words(modality: str, how: str) -> str:
        recommended = data.scaling[modality]
        return f"{modality} {how}" if how == recommended else f"{modality} {how} (in place of {recommended})"

    return ", ".join(words(modality, how) for modality, how in sorted(scaling(config, data).items()))


def _foreseen(config: Config) -> Iterator[str]:
    """That the run will end early, as who drops out is known: it could not be resumed with another configuration."""
    from fedxmr.participation import dropped, sampled, short_round

    if round := short_round(config):
        away, of = len(dropped(config, round)), len(sampled(config, round))
        yield (
            f"round {round} will end this run: with this dropout and seed {away} of {of} clients drop out of it, and "
            f"{config.federation.quorum} are needed (federation.min_clients)"
        )


def _headline(config: Config) -> str:
    federation = config.federation
    who = f"{federation.clients} client{'s' if federation.clients > 1 else ''}"
    per_round = f", {federation.sample} per round" if federation.sample not in (None, federation.clients) else ""
    dropout = f", dropout {federation.dropout:g}" if federation.dropout else ""
    rounds = f"{federation.rounds} round{'s' if federation.rounds > 1 else ''}"
    task = "" if config.dataset.task == "standard" else f", {config.dataset.task}"
    return (
        f"{config.method} + {config.learner.name} on {config.dataset.name}{task}: {who}{per_round}{dropout} "
        f"({config.partition.scheme}), {rounds}, seed {config.seed}"
    )


def _free_folder(config: Config) -> Path:
    """runs/<dataset>-<method>-<learner>-seed<seed>, or that with -2, -3 ... where it exists."""
    dataset = Path(config.dataset.name).name or "folder"
    learner = config.learner.name.rpartition(":")[2]
    name = f"{dataset}-{config.method}-{learner}-seed{config.seed}"
    candidates = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 1_000_000))
    return next(path for path in candidates if not path.exists())


if __name__ == "__main__":
    commands.main(simulate)
