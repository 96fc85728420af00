"""TensorBoard's event files, written where they are asked for.

TensorBoard's own writer has a thread, in which a full disk is a stack trace that nobody catches.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import RecordWriter

from fedxmr.errors import naming

_files = itertools.count()


class Events:
    """An open event file in a folder; TensorBoard shows all of a folder's files as one."""

    def __init__(self, folder: Path, first: int | None = None) -> None:
        """first: what earlier files hold of this step and later ones is not shown."""
        # TensorBoard reads a folder's files in the order of their names
        file = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_files):08d}"
        self._file = (folder / file).open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if first is not None:
            self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a number."""
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))

    def picture(self, tag: str, png: bytes, size: tuple[int, int]) -> None:
        """Add a PNG of a size (width, height)."""
        width, height = size
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        self._write(Event(summary=Summary(value=[Summary.Value(tag=tag, image=image)])))

    @property
    def name(self) -> str:
        """The file's path."""
        return self._file.name

    def flush(self) -> None:
        """Let TensorBoard see what was added. Raises OSError, as `close` does, where it cannot be written."""
        with naming(self.name):
            self._file.flush()

    def close(self) -> None:
        """Flush and close."""
        with naming(self.name):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self.name):
            self._records.write(event.SerializeToString())
