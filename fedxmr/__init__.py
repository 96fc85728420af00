"""Federated learning for cross-modal retrieval: FedCMR, FedAvg and FedProx, simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedxmr.models import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # on demand: `--help` must not wait for torch
    if name == "load":
        from fedxmr.models import load

        return load
    raise AttributeError(f"module 'fedxmr' has no attribute {name!r}")
