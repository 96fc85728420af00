"""`python -m fedxmr.centralized`: the non-federated baseline, one client with all the data."""

from __future__ import annotations

from fedxmr import commands
from fedxmr.commands import configure
from fedxmr.errors import InputError
from fedxmr.simulate import run


def centralized(
    assignments: commands.Assignments = None,
    config: commands.ConfigFile = None,
    dataset: commands.DatasetName = None,
    task: commands.Task = None,
    features: commands.Features = None,
    data_dir: commands.DataDir = None,
    learner: commands.LearnerName = None,
    rounds: commands.Rounds = None,
    seed: commands.Seed = None,
    protocol: commands.Protocol = None,
    evaluate_every: commands.EvaluateEvery = None,
    evaluate_on: commands.EvaluateOnPart = None,
    engine: commands.Engine = None,
    threads: commands.Threads = None,
    precision: commands.Precision = None,
    device: commands.Device = None,
    memory_budget: commands.MemoryBudget = None,
    gpus_per_client: commands.GpusPerClient = None,
    ray_address: commands.RayAddress = None,
    pictures: commands.Pictures = True,
    examples: commands.Examples = 0,
    out: commands.Out = None,
    overwrite: commands.Overwrite = False,
    resume: commands.Resume = None,
) -> None:
    """Train one model on all the data: a federation of a single client that shares nothing.

    A round is federation.epochs epochs. Later settings win: defaults, --config, options, KEY=VALUE. With --resume only
    federation.rounds may change.
    """
    options = {
        "dataset.name": dataset,
        "dataset.task": task,
        "dataset.features": features,
        "dataset.data_dir": data_dir,
        "federation.clients": 1,
        "federation.sample": 1,
        "federation.rounds": rounds,
        "federation.precision": precision,
        "partition.scheme": "iid",
        "strategy.name": "local",
        "learner.name": learner,
        "seed": seed,
        "evaluation.protocol": protocol,
        "evaluation.every": evaluate_every,
        "evaluation.on": evaluate_on,
        "runtime.engine": engine,
        "runtime.threads": threads,
        "runtime.device": device,
        "runtime.memory_budget": memory_budget,
        "runtime.gpus_per_client": gpus_per_client,
        "runtime.ray_address": ray_address,
    }
    checked = configure(config, options, assignments, resume=resume)
    if not checked.centralized:
        raise InputError("centralized: expected one client that shares nothing; fedxmr.simulate runs federations")
    run(checked, out, overwrite=overwrite, resume=resume, pictures=pictures, examples=examples)


if __name__ == "__main__":
    commands.main(centralized)
