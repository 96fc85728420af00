"""Which way imports point: commands -> server, clients -> the library, and Flower only where messages are carried."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path for folder in ("fedxmr", "clients", "server") for path in (ROOT / folder).rglob("*.py"))
COMMANDS = {"fedxmr/simulate.py", "fedxmr/centralized.py"}
CARRIERS = {"fedxmr/wire.py"}


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
    assert not packages & {"pickle", "cloudpickle", "dill", "joblib"}, "no pickle anywhere"
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


def test_there_is_something_to_check():
    assert len(MODULES) > 30
