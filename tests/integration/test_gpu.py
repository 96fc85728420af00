"""Several clients on one GPU through the engine `ray`; skipped, with the reason, where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Generator

from fedxmr.errors import FederationError
from fedxmr.types import Fit, Items, Proximal
from tests.federations import SMALL, TOY, federate
from tests.toy import Toy

ROOT = Path(__file__).resolve().parents[2]
SHARE = 0.33
TOLERANCE = 0.02
"""How far losses and mAP on a GPU may be from those on the CPU: sums in another order, no more."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_three_clients_share_one_gpu_within_their_part_of_it_and_agree_with_the_cpu(tmp_path):
    out = tmp_path / "gpu"
    command = [sys.executable, "-m", "fedxmr.simulate", *SMALL, "federation.rounds=5", "--no-pictures"]
    command += ["--engine", "ray", "--gpus-per-client", str(SHARE), "--out", str(out)]
    free, total = torch.cuda.mem_get_info()
    least = free
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end:
            least = min(least, torch.cuda.mem_get_info()[0])
            time.sleep(0.01)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert free - least <= 3 * SHARE * total
    environment = json.loads((out / "environment.json").read_text())
    assert environment["workers"] == 3
    assert environment["gpus_per_worker"] == SHARE
    on_gpu = json.loads((out / "summary.json").read_text())
    on_cpu = federate(tmp_path / "cpu", "federation.rounds=5", "runtime.device=cpu", "runtime.engine=local")
    for part in ("selected", "last"):
        mine, its = (summary["validation"][part]["mean"]["average"] for summary in (on_gpu, on_cpu))
        assert mine == pytest.approx(its, abs=TOLERANCE)
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for name in ("gpu", "cpu")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


def test_a_client_that_wants_more_than_its_part_fails_and_is_named(tmp_path):
    greedy = (
        "learner.name=tests.integration.test_gpu:Greedy",
        "runtime.engine=ray",
        f"runtime.gpus_per_client={SHARE}",
    )
    with pytest.raises(FederationError, match="client 0 failed in round 1: OutOfMemoryError"):
        federate(tmp_path / "run", *greedy, base=TOY)


class Greedy(Toy):
    """A learner that takes a little more of the GPU than its client's part."""

    def fit(self, data: Items, epochs: int, rng: Generator, proximal: Proximal | None = None) -> Fit:
        _, total = torch.cuda.mem_get_info()
        torch.empty(int(1.1 * SHARE * total), dtype=torch.uint8, device="cuda")
        return super().fit(data, epochs, rng, proximal)
