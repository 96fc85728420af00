"""How many workers, and how many threads and GPUs each: a pure function of what is asked and what is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedxmr.config import RuntimeConfig
from fedxmr.errors import InputError


@dataclass(frozen=True)
class Node:
    """What one machine of a cluster has."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Placement:
    """workers: how many. threads: of torch in each. cpus, gpus: what Ray sets aside for each."""

    workers: int
    threads: int
    cpus: float
    gpus: float

    def room(self, nodes: Sequence[Node]) -> int:
        """How many such workers these nodes can hold at most."""
        by_cpu = [int(node.cpus / self.cpus + 1e-9) for node in nodes]
        by_gpu = [_gpu_slots(node, self.gpus) if self.gpus else by_cpu[i] for i, node in enumerate(nodes)]
        return sum(min(pair) for pair in zip(by_cpu, by_gpu, strict=True))


def place(runtime: RuntimeConfig, nodes: Sequence[Node], per_round: int, *, gpu: bool) -> Placement:
    """The workers of a run.

    per_round: clients that take part in a round. gpu: whether clients train on a GPU.
    A worker trains one client at a time. Where neither `threads` nor `cpus_per_client` says how many cores it takes, as
    many workers as divide both cores (or GPU slots) and clients share all cores, so that no round has an idle core: two
    cores and three clients make one worker with two threads. Where it is said, as few workers as finish a round in the
    fewest waves. Raises InputError where what is asked is not there.
    """
    if not nodes:
        raise InputError("engine ray: expected a machine with a CPU, got none")
    gpus = (runtime.gpus_per_client or 1.0) if gpu else 0.0
    if runtime.gpus_per_client and not gpu:
        raise InputError(f"runtime.gpus_per_client: {runtime.gpus_per_client:g} cannot be had: there is no GPU to use")
    fixed = runtime.cpus_per_client or runtime.threads

    def slots_of(node: Node) -> int:
        by_cpu = node.cpus // (fixed or 1)
        return min(by_cpu, _gpu_slots(node, gpus)) if gpu else by_cpu

    nodes = [node for node in nodes if slots_of(node)]
    if not nodes:
        asked = {"cores": fixed, "GPUs": runtime.gpus_per_client}
        what = " and ".join(f"{number:g} {name}" for name, number in asked.items() if number) or "a core and a GPU"
        raise InputError(f"engine ray: {what} for a worker are more than any machine has")
    slots, cores = sum(map(slots_of, nodes)), sum(node.cpus for node in nodes)
    smallest = min(node.cpus for node in nodes)
    if runtime.workers is not None:
        workers = runtime.workers
        if workers > per_round:
            raise InputError(f"runtime.workers: expected at most the {per_round} clients of a round, got {workers}")
        if workers > slots and (gpu or runtime.cpus_per_client):
            raise InputError(f"runtime.workers: expected at most {slots}, as there is no room for more, got {workers}")
    elif fixed and not gpu:
        workers = math.ceil(per_round / math.ceil(per_round / slots))
    else:
        workers = max(math.gcd(slots, per_round), 1 if gpu else len(nodes))

    def of(workers: int) -> Placement:
        share = min(cores // workers, smallest)
        threads = runtime.threads or runtime.cpus_per_client or max(share, 1)
        cpus = runtime.cpus_per_client or (float(threads) if threads * workers <= cores else cores / workers)
        return Placement(workers, threads, cpus, gpus)

    if runtime.workers is not None:
        return of(workers)
    # machines of different sizes may not have room for equal shares of all cores
    return next(found for w in range(workers, 0, -1) if (found := of(w)).room(nodes) >= w)


def _gpu_slots(node: Node, gpus: float) -> int:
    """Workers of so many GPUs each that a node has room for; Ray does not divide a fraction over two GPUs."""
    return node.gpus * int(1 / gpus + 1e-9) if gpus <= 1 else node.gpus // int(gpus)
