"""`python -m benchmarks`: time fedxmr against what it is compared with, in turn, and say the ratios."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.suite import BENCHMARKS, OPTIONAL, Plan
from benchmarks.timing import HEAD, Measured
from fedxmr import commands
from fedxmr.commands import option, say
from fedxmr.errors import InputError, unknown
from fedxmr.machine import cores, memory
from fedxmr.processes import ROOT
from fedxmr.recording import write_json, write_text
from fedxmr.reproduce import read_page, with_section
from fedxmr.tables import Table


def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[BENCHMARK]...", help=f"of {', '.join(BENCHMARKS)}; all but pfl")
    ] = None,
    turns: Annotated[int, option("how often each command runs, in turn with what it is compared with", "--turns")] = 5,
    rounds: Annotated[int, option("rounds of the longest job; others have fewer")] = 40,
    out: Annotated[Path, option("the folder for a JSON file per benchmark")] = Path("build/benchmarks"),
    into: Annotated[Path | None, option("a Markdown page whose sections are written anew")] = None,
) -> None:
    """Time fedxmr against what it is compared with. Ratios are of runs that followed each other: machines are noisy."""
    for name in names or ():
        if name not in BENCHMARKS:
            raise unknown("benchmark", name, BENCHMARKS)
    if turns < 1 or rounds < 2:
        raise InputError(f"expected --turns of 1 or more and --rounds of 2 or more, got {turns} and {rounds}")
    names = names or [name for name in BENCHMARKS if name not in OPTIONAL]
    if into is not None:
        for name in names:
            with_section(read_page(into), name, "")  # better refused now than after an hour
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: expected a folder, got {error.strerror or error}") from error
    for name in names:
        say(f"{name}: {_first_line(name)}")
        with tempfile.TemporaryDirectory(prefix="fedxmr-bench-") as scratch:
            plan = Plan(turns, rounds, Path(scratch))
            before = os.getloadavg()[0]
            measured = []
            for one in BENCHMARKS[name](plan):
                say("  " + "  ".join(cell for cell in one.cells() if cell))
                measured.append(one)
            facts = {"command": _command(name, turns, rounds), "load_before": before, **_machine()}
            write_json(out / f"{name}.json", {**facts, "measured": [vars(one) for one in measured]})
            for picture in Path(scratch).glob("*.png"):
                shutil.copy(picture, out / picture.name)
        if into is not None:
            write_text(into, with_section(read_page(into), name, _section(name, facts, measured)))


def _section(name: str, facts: dict[str, Any], measured: list[Measured]) -> str:
    caption = f"{_first_line(name)} {_sentence(facts)}"
    return f"`{facts['command']}`\n\n{Table(caption, HEAD, [one.cells() for one in measured]).markdown()}"


def _sentence(facts: dict[str, Any]) -> str:
    return (
        f"Commit {facts['commit']}, {facts['cores']} cores ({facts['processor']}), {facts['gpu']}, "
        f"{facts['memory_gib']} GiB, Python {facts['python']}, "
        + ", ".join(f"{package} {of}" for package, of in facts["packages"].items())
        + f"; load of the machine before: {facts['load_before']:.1f}."
    )


def _command(name: str, turns: int, rounds: int) -> str:
    return f"python -m benchmarks {name} --turns {turns} --rounds {rounds}"


def _first_line(name: str) -> str:
    return (BENCHMARKS[name].__doc__ or "").splitlines()[0]


def _machine() -> dict[str, Any]:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=7", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "commit": found.stdout.strip() or "unknown",
        "cores": cores(),
        "processor": _processor(),
        "memory_gib": round(memory() / 2**30),
        "gpu": ", ".join(gpus) or "no GPU",
        "python": platform.python_version(),
        "packages": {package: version(package) for package in ("torch", "flwr", "ray", "numpy")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    commands.main(bench)
