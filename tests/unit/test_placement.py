"""How many workers, with how many threads and GPUs each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedxmr.config import RuntimeConfig
from fedxmr.engines.placement import Node, Placement, place
from fedxmr.errors import InputError


def placed(cores=2, gpus=0, per_round=3, machines=1, **runtime) -> Placement:
    return place(RuntimeConfig(**runtime), [Node(cores, gpus)] * machines, per_round, gpu=gpus > 0)


@pytest.mark.parametrize(
    ("cores", "per_round", "workers", "threads"),
    [
        (2, 3, 1, 2),  # two workers would take two waves, and leave a core idle in the second
        (2, 4, 2, 1),
        (8, 3, 1, 8),
        (8, 12, 4, 2),
        (6, 9, 3, 2),
        (16, 16, 16, 1),
        (1, 5, 1, 1),
        (4, 1, 1, 4),
    ],
)
def test_as_many_workers_as_divide_cores_and_clients_share_all_cores(cores, per_round, workers, threads):
    assert placed(cores, per_round=per_round) == Placement(workers, threads, float(threads), 0.0)


@given(cores=st.integers(1, 64), per_round=st.integers(1, 100))
def test_workers_times_threads_are_the_cores(cores, per_round):
    found = placed(cores, per_round=per_round)
    assert found.workers * found.threads == cores
    assert per_round % found.workers == 0
    larger = [w for w in range(found.workers + 1, cores + 1) if cores % w == 0 and per_round % w == 0]
    assert not larger


@given(
    cores=st.integers(1, 32),
    machines=st.integers(1, 5),
    per_round=st.integers(1, 40),
    workers=st.one_of(st.none(), st.integers(1, 40)),
    threads=st.one_of(st.none(), st.integers(1, 8)),
)
def test_what_is_placed_has_room(cores, machines, per_round, workers, threads):
    try:
        found = placed(cores, per_round=per_round, machines=machines, workers=workers, threads=threads)
    except InputError:
        assert (threads or 0) > cores or (workers or 0) > per_round
        return
    nodes = [Node(cores, 0)] * machines
    assert found.workers >= 1
    if workers is None or workers <= cores * machines // found.threads:
        assert found.room(nodes) >= min(found.workers, machines)
    assert workers is None or found.workers == workers


@given(
    nodes=st.lists(st.builds(Node, cpus=st.integers(1, 16), gpus=st.integers(0, 3)), min_size=1, max_size=5),
    per_round=st.integers(1, 20),
    threads=st.one_of(st.none(), st.integers(1, 8)),
    share=st.one_of(st.none(), st.sampled_from([0.25, 0.33, 0.5, 1.0, 2.0])),
    gpu=st.booleans(),
)
def test_machines_of_any_sizes_have_room_for_all_that_is_placed(nodes, per_round, threads, share, gpu):
    gpu = gpu and any(node.gpus for node in nodes)
    try:
        found = place(RuntimeConfig(threads=threads, gpus_per_client=share if gpu else None), nodes, per_round, gpu=gpu)
    except InputError:
        usable = [node.cpus for node in nodes if not gpu or node.gpus >= (share or 1.0)]
        assert max(usable, default=0) < (threads or 1)
        return
    assert found.room(nodes) >= found.workers >= 1


def test_one_thread_for_each_means_the_fewest_waves():
    assert placed(2, per_round=3, threads=1) == Placement(2, 1, 1.0, 0.0)
    assert placed(8, per_round=10, threads=1).workers == 5  # two waves either way
    assert placed(8, per_round=3, threads=1).workers == 3
    assert placed(8, per_round=3, cpus_per_client=4).workers == 2
    assert placed(8, per_round=3, cpus_per_client=4).threads == 4


def test_more_workers_than_cores_share_them():
    found = placed(2, workers=4, per_round=8)
    assert (found.workers, found.threads, found.cpus) == (4, 1, 0.5)


def test_every_machine_of_a_cluster_has_a_worker():
    found = placed(8, per_round=3, machines=2)
    assert (found.workers, found.threads) == (2, 8)
    assert placed(1, per_round=3, machines=2) == Placement(2, 1, 1.0, 0.0)


@pytest.mark.parametrize(
    ("share", "gpus", "per_round", "workers"),
    [(None, 1, 3, 1), (0.33, 1, 3, 3), (0.25, 2, 6, 2), (0.5, 1, 3, 1), (2.0, 4, 2, 2), (1.0, 4, 8, 4)],
)
def test_gpu_slots_and_clients_decide_where_there_is_a_gpu(share, gpus, per_round, workers):
    found = placed(16, gpus=gpus, per_round=per_round, gpus_per_client=share)
    assert found.workers == workers
    assert found.gpus == (share or 1.0)
    assert found.threads == 16 // workers


def test_a_fraction_of_a_gpu_is_not_divided_over_two():
    assert Placement(3, 1, 1.0, 0.6).room([Node(8, 2)]) == 2
    assert Placement(3, 1, 1.0, 0.6).room([Node(1, 2)]) == 1  # cores are needed too


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        ({"gpus_per_client": 0.5}, "runtime.gpus_per_client: 0.5 cannot be had: there is no GPU"),
        ({"cpus_per_client": 3}, "3 cores for a worker are more than any machine has"),
        ({"threads": 3}, "3 cores for a worker are more than any machine has"),
        ({"workers": 3, "cpus_per_client": 1}, "runtime.workers: expected at most 2"),
        ({"workers": 4}, "runtime.workers: expected at most the 3 clients of a round, got 4"),
    ],
)
def test_what_is_not_there_is_refused(runtime, says):
    with pytest.raises(InputError, match=says):
        placed(**runtime)


def test_no_machine_at_all_is_refused():
    with pytest.raises(InputError, match="expected a machine with a CPU"):
        place(RuntimeConfig(), [], 3, gpu=False)
