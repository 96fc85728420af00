"""FedAvg in Flower's own Ray simulation, as its documentation shows it: a ServerApp, a ClientApp and `run_simulation`.

A client's Adam moments lie in its `context.state`. There are as many Ray workers as the job has threads, of one thread
each: for three clients on two busy cores, three workers or one of two threads were no faster. A worker reads the data
once. Two things are added to Flower's strategy: a client's error ends the run, where it would go on with the average of
the others; and not every round has an evaluation.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import cast

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: TID251 - what it is
from flwr.clientapp import ClientApp  # noqa: TID251
from flwr.serverapp import Grid, ServerApp  # noqa: TID251
from flwr.serverapp.strategy import FedAvg  # noqa: TID251
from flwr.simulation import run_simulation  # noqa: TID251
from torch import Generator

from benchmarks.references.dscmr import DSCMR, mean_average_precision
from benchmarks.references.job import Data, Job, load, say

MEASURED = 20
"""At most so many clients are measured in a round."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Local epochs from the averaged model on; the reply has the client's own model."""
    job, data, model = received(message)
    config = message.content.config_records["config"]
    number, round = int(context.node_config["partition-id"]), config["server-round"]
    optimizer = torch.optim.Adam(model.parameters(), lr=job.lr, betas=job.betas, fused=True)
    if "moments" in context.state:
        kept = context.state.array_records["moments"].to_torch_state_dict()
        for name, p in model.named_parameters():
            optimizer.state[p] = {key: kept[f"{name}/{key}"] for key in MOMENTS}
    items = data.parts[number]
    rng = Generator().manual_seed(hash((job.seed, round, number)))
    image, text, classes = data.train
    for _ in range(job.epochs):
        for batch in torch.split(items[torch.randperm(len(items), generator=rng)], job.batch_size):
            loss = model.loss(image[batch], text[batch], classes[batch], job.lambda_, job.eta)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    context.state["moments"] = ArrayRecord(
        {f"{name}/{key}": optimizer.state[p][key] for name, p in model.named_parameters() for key in MOMENTS}
    )
    metrics = MetricRecord({"num-examples": len(items)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower gives both
    """The averaged model's mAP on the validation items."""
    _, data, model = received(message)
    score = mean_average_precision(model, *data.validation)
    metrics = MetricRecord({"map": score, "num-examples": len(data.validation[2])})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def received(message: Message) -> tuple[Job, Data, DSCMR]:
    """A message's job, the data, and the model, whose parameters are the message's arrays themselves."""
    job, data = opened(str(message.content.config_records["config"]["job"]))
    with torch.device("meta"):
        model = network(job, data)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict(), assign=True)
    return job, data, model


def network(job: Job, data: Data) -> DSCMR:
    """A new model of the job's sizes."""
    image, text, _ = data.train
    return DSCMR(image.shape[1], text.shape[1], job.hidden, job.width, data.classes)


@functools.cache
def opened(text: str) -> tuple[Job, Data]:
    """A job, as JSON, and its data: read once in a process."""
    job = Job(**json.loads(text))
    return job, load(job)


class Strict(FedAvg):
    """FedAvg that needs every reply, and that evaluates every so many rounds and after the last."""

    def __init__(self, job: Job) -> None:
        sample, measured = job.sample or job.clients, min(job.clients, MEASURED) if job.evaluate_every else 0
        super().__init__(
            fraction_train=sample / job.clients,
            fraction_evaluate=measured / job.clients,
            min_train_nodes=sample,  # because that fraction of the nodes is rounded down
            min_evaluate_nodes=measured,
            min_available_nodes=job.clients,
        )
        self.job = job

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No message where the round has no evaluation."""
        return super().configure_evaluate(server_round, arrays, config, grid) if self.evaluates(server_round) else []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The average of all."""
        return super().aggregate_train(server_round, complete(replies, self.min_train_nodes))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The average of all, or nothing."""
        expected = self.min_evaluate_nodes if self.evaluates(server_round) else 0
        return super().aggregate_evaluate(server_round, complete(replies, expected))

    def evaluates(self, server_round: int) -> bool:
        """Whether a round has an evaluation."""
        every = self.job.evaluate_every
        return every > 0 and (server_round % every == 0 or server_round == self.job.rounds)


def complete(replies: Iterable[Message], expected: int) -> list[Message]:
    """The replies; RuntimeError if one is an error or missing."""
    replies = list(replies)
    errors = [reply.error.reason for reply in replies if reply.has_error()]
    if errors or len(replies) != expected:
        raise RuntimeError(f"expected {expected} replies, got {len(replies)} with {len(errors)} errors: {errors[:1]}")
    return replies


def main() -> None:
    """Run the job."""
    job = Job.from_command_line()
    if job.strategy != "fedavg":
        raise ValueError(f"strategy: expected fedavg, got {job.strategy}")
    torch.set_num_threads(1)  # here it only reads the data; the workers train
    scores: list[float] = []
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower gives both
        text = json.dumps(asdict(job))
        torch.manual_seed(job.seed)
        result = Strict(job).start(
            grid,
            initial_arrays=ArrayRecord(network(*opened(text)).state_dict()),
            num_rounds=job.rounds,
            train_config=ConfigRecord({"job": text}),
            evaluate_config=ConfigRecord({"job": text}),
        )
        last = result.evaluate_metrics_clientapp.get(job.rounds)
        scores.append(cast("float", last["map"]) if last else math.nan)

    run_simulation(
        server,
        client,
        num_supernodes=job.clients,
        backend_config={
            "init_args": {"address": "local", "num_cpus": job.threads},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    say(scores[-1])


if __name__ == "__main__":
    # Ray sends the functions of a script by value and with every message, and what they cache would be lost
    from benchmarks.references.flower_simulation import main as imported

    imported()
