"""What the server and a client say to each other; wire.py puts it into Flower messages.

A run is one `Registration` per client, then per round one `Task` and its `Update`, in the end a `Farewell` and its
`Report`. In a simulation `Checkpoint`s stand between rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedxmr.scaling import Moments, Scaler
from fedxmr.types import DataSpec, State

Scores = Mapping[str, float]
"""mAP by direction ("image->text") and their mean ("average")."""


@dataclass(frozen=True)
class Registration:
    """Who a client is. No item leaves it: counts, and per modality count, mean and centred sum of squares.

    class_counts: [C] int64. held: modality -> how many of its items have it, of those that any has.
    moments: of the modalities among them whose scaling takes them. initial_sha256: of the seeded shared state.
    """

    client: int
    n: int
    class_counts: Tensor
    spec: DataSpec
    held: Mapping[str, int]
    moments: Mapping[str, Moments]
    versions: Mapping[str, str]
    initial_sha256: str


@dataclass(frozen=True)
class Task:
    """What a client is asked to do in one message of round t.

    Take over `shared` (W_{t-1}) and enhance; evaluate if asked; then, if `fit`, the joint stage of round t.

    base: the round of the client's last accepted reply, from whose state it starts; 0: from the seeded initial state.
    keep: False for an evaluation on a copy, of which no training state is kept.
    leader: the round that leads on validation so far, 0 for none.
    scaler: the common means and deviations, with base 0; kept by the client from then on.
    """

    round: int
    client: int
    base: int
    shared: State
    fit: bool = True
    keep: bool = True
    evaluate: bool = False
    leader: int = 0
    scaler: Scaler | None = None


@dataclass(frozen=True)
class Update:
    """A client's answer to a task.

    loss: of the joint stage; None where there was none or the client could not train (then it abstains).
    shared: W_t^k, the shared names the client owns; empty without a loss.
    validation, test: the scores of the model of round t-1, where the task asked for them.
    seconds: what the client's parts took, by its own clock; for the eye only.
    """

    round: int
    client: int
    n: int
    class_counts: Tensor
    loss: float | None
    shared: State
    validation: Scores | None = None
    test: Scores | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Farewell:
    """The end of a run: the round to hold as `selected` (0: none), and whether to measure it and the last on test.

    base: as in a task.
    """

    client: int
    base: int
    selected: int
    last: int
    evaluate: bool


@dataclass(frozen=True)
class Report:
    """A client's last word: test scores of its selected and last model, and the hash of its final state."""

    client: int
    selected: Scores | None
    last: Scores | None
    state_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """In a simulation: write a client's state to a file of the run folder, or go back to the one that is there.

    base: as in a task.
    """

    client: int
    base: int
    file: str
