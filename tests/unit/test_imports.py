"""Which way imports point: commands -> server, clients -> the library, and Flower only where messages are carried."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for folder in ("fedxmr", "clients", "server") for path in (ROOT / folder).rglob("*.py"))
COMMANDS = {"fedxmr/simulate.py", "fedxmr/centralized.py", "fedxmr/deploy.py"}
CARRIERS = {"fedxmr/wire.py"}


PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
UNSAFE = {f"{torch}.{name}" for torch in ("torch", "torch.serialization", "torch.jit") for name in ("load", "save")}
UNSAFE |= {f"{numpy}.{name}" for numpy in ("np", "numpy") for name in ("load", "save", "savez_compressed")}
UNSAFE |= {f"{npy}.{name}" for npy in ("npy", "np.lib.format") for name in ("read_array", "open_memmap")}
UNSAFE |= {"yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pandas.read_pickle"}


def used(path: Path) -> Iterator[str]:
    """Every dotted name in a file."""
    yield from (ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_it_may(path):
    name = str(path.relative_to(ROOT))
    packages = {module.partition(".")[0] for module in imported(path)}
    modules = set(imported(path))
    assert not packages & PICKLERS, "no pickle anywhere"
    assert not set(used(path)) & UNSAFE, "it may unpickle, or believes what it reads"
    carries = name in COMMANDS | CARRIERS or name.startswith(("fedxmr/engines/", "clients/", "server/"))
    if not carries:
        assert not packages & {"flwr", "ray"}, "only what carries messages may know Flower or Ray"
    if not name.startswith("fedxmr/engines/"):
        assert "ray" not in packages
    if name not in COMMANDS:
        assert not packages & {"server", "clients"} - {name.partition("/")[0]}, "only the commands may"
    if name.startswith("fedxmr/learners/"):
        known = {"fedxmr.types", "fedxmr.errors", "fedxmr.learners"}
        outside = {m for m in modules if m.startswith("fedxmr.") and not any(m.startswith(k) for k in known)}
        assert not outside, "a learner knows neither strategies nor files"
    if name == "fedxmr/strategies.py":
        assert not any(m.startswith("fedxmr.learners") for m in modules)


UNPICKLING = """
import pickle
import cloudpickle
import dill
import joblib
import marshal
import shelve
from joblib import load
torch.load("x")
torch.save({}, "x")
np.load("x", allow_pickle=True)
"""
EXECUTING = """
yaml.load("x", yaml.Loader)
eval("1")
exec("1")
"""
LINES = "import numpy as np\nimport torch\nimport yaml\n"


@pytest.mark.parametrize(("place", "lines"), [("fedxmr/data/x.py", UNPICKLING + EXECUTING), ("server/x.py", EXECUTING)])
def test_the_linter_refuses_what_unpickles_or_executes_what_it_reads(place, lines):
    """Where Flower may be known its list of banned names is off: there the test of modules above stands for it."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format=concise",
        "--stdin-filename",
        place,
    ]
    text = LINES + lines
    ran = subprocess.run([*command, "-"], input=text, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)
    found = {
        int(line.split(":")[1])
        for line in ran.stdout.splitlines()
        if any(f" {rule} " in line for rule in ("TID251", "S102", "S301", "S302", "S307", "S506"))
    }
    expected = {i for i, line in enumerate(text.splitlines(), 1) if line and line not in LINES.splitlines()}
    assert found == expected


def test_no_module_passes_that_names_what_unpickles(tmp_path):
    for line in UNPICKLING.split("\n")[1:-1]:
        path = tmp_path / "x.py"
        path.write_text(LINES + line)
        assert {m.partition(".")[0] for m in imported(path)} & PICKLERS or set(used(path)) & UNSAFE, line


def test_there_is_something_to_check():
    assert len(MODULES) > 30
