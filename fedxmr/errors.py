"""The errors a user can cause or meet, each shown as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager


class InputError(ValueError):
    """A bad argument, file or configuration. The message names the thing, what was expected and what came."""


class FederationError(RuntimeError):
    """A federation that could not go on: a client failed, or too few good updates came for a round to stand."""


class StateLost(RuntimeError):
    """What clients held in memory is gone with the process that held it; the run can go on from its last checkpoint.

    kind, round: of the message at which it happened.
    died: client -> why, of those that were being worked for when their process died.
    hung: client -> why, of those whose process was ended because they did not answer in time.
    found: client -> why, of those whose process was found to have died before it turned to them.
    """

    def __init__(
        self,
        kind: str,
        round: int,
        *,
        died: Mapping[int, str] | None = None,
        hung: Mapping[int, str] | None = None,
        found: Mapping[int, str] | None = None,
    ) -> None:
        self.died, self.hung, found = dict(died or {}), dict(hung or {}), dict(found or {})
        reasons = {**self.died, **self.hung, **found}
        super().__init__("; ".join(f"client {client}: {reason}" for client, reason in sorted(reasons.items())))
        self.kind = kind
        self.round = round


def one_line(error: BaseException) -> str:
    """An error's own words without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """An error's kind and its own words, in one line."""
    words = one_line(error)
    kind = type(error).__name__
    return kind if words == kind else f"{kind}: {words}"


@contextmanager
def naming(file: object) -> Iterator[None]:
    """Within it an OSError of an open file, which does not say of which, gets that file's name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory; of the CPU's torch says so in a plain RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in ("out of memory", "can't allocate memory"))


REASON = 500
"""The longest reason that is shown: what a client says may be of any length."""


def in_one_line(text: str) -> str:
    """What somebody else said, as one line that can be shown."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= REASON else f"{line[:REASON]} ..."


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a list, with the nearest one that is."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")
