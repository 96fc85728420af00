"""Ray itself: a private one for the run, or a running cluster.

A private Ray is started for this run, closed to anyone without its token, and gone after it, however it ends. A cluster
is only ever joined by an address that was given, and keeps running.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
import torch
from ray._private import services

from fedxmr.commands import SWIFT
from fedxmr.config import RuntimeConfig
from fedxmr.engines.placement import Node
from fedxmr.errors import FederationError, InputError
from fedxmr.machine import cores
from fedxmr.timing import clock

TEMPORARY = 27
"""The longest path of a temporary folder below which Ray's sockets fit into the 107 bytes of a socket's name."""

PATIENCE = 30.0
"""Seconds a cluster has to say that it is one."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # as Ray does now: a worker without GPUs sees none
}
PRIVATE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}  # so soon Ray's processes end where this one is killed


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

VITAL = ("raylet", "gcs_server")
"""The processes without which a private Ray is none."""

Check = Callable[[], None]
"""Raises FederationError where Ray itself has died. Ray would end this process, some time later, without a word."""


@contextmanager
def opened(runtime: RuntimeConfig) -> Iterator[Check]:
    """Ray, while it lasts. Raises InputError where it cannot be had."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    if runtime.ray_address is None:
        with _private(runtime) as check:
            yield check
        return
    try:
        _init(address=runtime.ray_address, runtime_env={"env_vars": _variables()})
        yield partial(_check_cluster, runtime.ray_address)
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """The living nodes that have a CPU."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [Node(int(r["CPU"]), int(r.get("GPU", 0))) for r in resources if r.get("CPU", 0) >= 1]


def gpus_here(runtime: RuntimeConfig) -> int:
    """The GPUs of this machine that clients may use."""
    return 0 if runtime.device.startswith("cpu") else torch.cuda.device_count()


@contextmanager
def _private(runtime: RuntimeConfig) -> Iterator[Check]:
    usual = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="fedxmr-", dir=usual if len(usual) <= TEMPORARY else "/tmp"))
    gpus = gpus_here(runtime)
    try:
        with _environment({**_variables(), **PRIVATE}), _without_dashboard():
            _init(address="local", num_cpus=cores(), num_gpus=gpus, include_dashboard=False, _temp_dir=str(folder))
        folder.chmod(0o700)  # Ray opens it to everybody
        yield partial(_check_processes, [p for p in psutil.Process().children() if p.name() in VITAL])
    finally:
        ray.shutdown()
        _end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_dashboard() -> Iterator[None]:
    """Ray starts without the process of its dashboard.

    Ray starts that even where no dashboard is asked for, to send usage statistics; and where those are off, it still
    asks the metadata servers of three clouds whether it runs there. That this function is Ray's own is seen by a test
    that counts what is sent.
    """
    start = services.start_api_server
    services.start_api_server = lambda *_, **__: (None, None)  # as where it does not start, which Ray takes
    try:
        yield
    finally:
        services.start_api_server = start


def _init(address: str, **options: Any) -> None:
    """ray.init, which takes SIGTERM for itself and may swallow what a handler raises: neither is left at that.

    Raises InputError where a cluster cannot be joined, FederationError where a private Ray does not start.
    """
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {int(number): signal.getsignal(number) for number in SIGNALS}
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        handler = handlers[number]
        if callable(handler):
            handler(number, frame)

    try:
        if in_main:
            for number in (number for number, handler in handlers.items() if callable(handler)):
                signal.signal(number, note)
        with clock.part("start_up"):
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        if came:  # and Ray has swallowed what the handler raised
            raise KeyboardInterrupt
    except SystemExit as error:  # SIGTERM came meanwhile
        note(signal.SIGTERM, None)
        raise KeyboardInterrupt from error
    except Exception as error:  # Ray raises that itself, and whatever it trips on
        why = " ".join(str(error).split())
        if address == "local":
            raise FederationError(f"engine ray: a private Ray does not start: {why}") from error
        raise InputError(f"engine ray: the cluster at {address} cannot be joined: {why}") from error
    finally:
        if in_main:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _variables() -> dict[str, str]:
    """What is set for workers; of what is for torch, what a user has set here stays as it is."""
    return {**ENVIRONMENT, **{name: os.environ.get(name, value) for name, value in SWIFT.items()}}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started within."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _end_processes(folder: Path) -> None:
    """End what is left of a private Ray: its own shutdown knows nothing of a start that was interrupted."""
    own = [process for process in psutil.Process().children() if str(folder) in " ".join(_command(process))]
    left = [*own, *(below for process in own for below in process.children(recursive=True))]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ends just now
        return []


def _check_processes(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise FederationError("engine ray: one of Ray's own processes, raylet or gcs_server, has died")


def _check_cluster(address: str) -> None:
    if (silence := _silence(address)) is not None:
        raise FederationError(f"engine ray: the cluster is gone: {silence}")


def ask(address: str) -> None:
    """See that a cluster is at an address. Raises InputError; Ray itself would wait for a minute, or for ever."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"runtime.ray_address: expected host:port, such as 10.0.0.1:6379, got {address!r}")
    if (silence := _silence(address)) is not None:
        raise InputError(f"runtime.ray_address: {silence}")
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise InputError(
            f"runtime.ray_address: expected a Ray cluster of version {ray.__version__} at {address}, "
            f"and its token where it has one, but `ray health-check` does not succeed there"
        ) from error


def _silence(address: str) -> str | None:
    """Why nobody can be reached at an address; None where somebody listens."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        return f"nobody answers at {address}: {error}"
    return None
