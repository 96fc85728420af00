"""The Flower ServerApp: the round loop.

Round t's message carries W_{t-1} and brings back W_t^k together with the scores of round t-1; one more message flushes
the last merge and enhancement. Nothing counts before it is checked, and every failure is named.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedxmr import checkpoint, state, wire
from fedxmr.checks import check_registrations, find_fault
from fedxmr.config import Config
from fedxmr.errors import FederationError
from fedxmr.evaluation import mean_scores
from fedxmr.messages import Checkpoint, Farewell, Registration, Report, Scores, Task, Update
from fedxmr.participation import evaluated, panel, sampled
from fedxmr.progress import Progress
from fedxmr.recording import Recorder, write_json
from fedxmr.rounds import build_learner, initial_state, owned_names
from fedxmr.scaling import Scaler, combine_moments
from fedxmr.selection import Selection
from fedxmr.strategies import Contribution, client_weights, combine, shared_names
from fedxmr.summary import summarise
from fedxmr.timing import clock
from fedxmr.types import State

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation and fill its run folder. Raises FederationError where it cannot go on."""
    config = Config.from_yaml(str(context.run_config["config"]))
    out = Path(str(context.run_config["out"]))
    shared, facts = checkpoint.newest(out) if context.run_config.get("resume") else ({}, {})
    with Recorder(out, facts.get("records")) as recorder, Progress(config) as progress:
        Federation(grid, config, recorder, progress).run(shared, facts)


class Federation:
    """A run as the server sees it: who is there, what is shared, and what was accepted from whom."""

    def __init__(self, grid: Grid, config: Config, recorder: Recorder, progress: Progress) -> None:
        self._grid = grid
        self._config = config
        self._recorder = recorder
        self._progress = progress
        self._panel = panel(config)
        self._nodes: dict[int, int] = {}
        self._registered: dict[int, Registration] = {}
        self._expected: dict[int, State] = {}
        self._base: dict[int, int] = {}
        self._selection = Selection()
        self._shared: State = {}
        self._selected_shared: State = {}
        self._bytes = {"up": 0, "down": 0}
        self._participation: dict[str, list[int]] = {}
        self._rejected: list[dict[str, Any]] = []
        self._failed: list[dict[str, Any]] = []
        self._checkpointed = 0

    def run(self, shared: State, facts: Mapping[str, Any]) -> None:
        """The whole run: register, T rounds, flush, farewell. With a checkpoint's arrays and facts: the rest of it."""
        last = self._config.federation.rounds
        every = self._config.federation.checkpoint_every
        with clock.part("start_up"):
            self._start()
            if facts:
                self._restore(shared, facts)
        for round in range(self._checkpointed + 1, last + 1):
            self._round(round)
            if every and round % every == 0:
                self._checkpoint(round)
        self._flush(last + 1)
        self._finish(last)

    def _start(self) -> None:
        """Ask every node who it is, and agree on the initial state and the standardisation."""
        config = self._config
        registrations = self._register()
        spec = registrations[0].spec
        learner = build_learner(config, spec, torch.device("cpu"), None)
        shared = shared_names(config.strategy, learner)
        initial = initial_state(config, spec)
        self._shared = {name: initial[name] for name in sorted(shared)}
        check_registrations(registrations, config.federation.clients, state.sha256(self._shared))
        self._by_class = learner.by_class
        for r in registrations:
            self._registered[r.client] = r
            self._expected[r.client] = {n: initial[n] for n in sorted(owned_names(shared, learner, r.held))}
        self._scaler = Scaler({}, {})
        if config.federation.standardise == "federated":
            modalities = sorted({m for r in registrations for m in r.moments})
            parts = {m: [r.moments[m] for r in registrations if m in r.moments] for m in modalities}
            self._scaler = Scaler.of({m: combine_moments(parts[m]) for m in modalities})

    def _register(self) -> list[Registration]:
        """The registrations of all nodes, by client. Raises FederationError for a node that does not answer."""
        nodes = self._wait_for_nodes()
        messages = [Message(wire.pack_start(), node, wire.START) for node in nodes]
        registrations = []
        answered = set()
        for reply in self._grid.send_and_receive(messages, timeout=self._config.federation.start_deadline):
            node = reply.metadata.src_node_id
            answered.add(node)
            if reply.has_error():
                raise FederationError(f"a client failed at the start: {reply.error.reason}")
            registration = wire.unpack_registration(reply.content)
            registrations.append(registration)
            self._nodes[registration.client] = node
        if silent := len(nodes) - len(answered):
            raise FederationError(f"{silent} of {len(nodes)} clients did not answer the start query in time")
        return sorted(registrations, key=lambda r: r.client)

    def _wait_for_nodes(self) -> list[int]:
        wanted = self._config.federation.clients
        deadline = time.monotonic() + self._config.federation.start_deadline
        while len(nodes := sorted(self._grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                raise FederationError(f"expected {wanted} clients, {len(nodes)} were there in time")
            time.sleep(0.1)
        return nodes

    def _round(self, round: int) -> None:
        """One round: a task for every sampled client, and their updates combined into W_t."""
        strategy = self._config.strategy
        chosen = sampled(self._config, round)
        self._participation[str(round)] = chosen
        updates = self._exchange(round, chosen, fit=True)
        stood = [u for u in updates if u.client in chosen]
        if len(stood) < self._config.federation.quorum:
            raise FederationError(
                f"round {round}: {len(stood)} good updates, expected at least {self._config.federation.quorum}"
            )
        with clock.part("aggregation"):
            contributions = [
                Contribution(u.client, u.n, u.class_counts, u.loss, u.shared) for u in stood if u.loss is not None
            ]
            weights = client_weights(strategy, contributions) if contributions else torch.zeros(0)
            self._shared = combine(self._shared, contributions, weights, self._by_class, strategy.server_step)
        for contribution, weight in zip(contributions, weights.tolist(), strict=True):
            self._recorder.note(round, contribution.client, loss=contribution.loss, weight=weight)
        losses = [c.loss for c in contributions]
        self._progress.trained(round, sum(losses) / len(losses) if losses else None)
        self._record_events(round, contributions, weights)

    def _flush(self, round: int) -> None:
        """The last message: every client that took part, and the panel, merges W_T, enhances and is evaluated."""
        self._exchange(round, sorted(self._base.keys() | set(self._panel)), fit=False)
        self._recorder.write_up_to(round)

    def _exchange(self, round: int, chosen: Sequence[int], *, fit: bool) -> list[Update]:
        """Send the tasks of a round's message, and return what counts of the answers, by client.

        Scores of the round before are recorded. Panel members that are not chosen are evaluated on a copy.
        """
        watched = self._panel if evaluated(self._config, round - 1) else []
        tasks = [self._task(round, k, fit=fit, keep=True, evaluate=k in watched) for k in chosen]
        tasks += [self._task(round, k, fit=False, keep=False, evaluate=True) for k in watched if k not in chosen]
        updates = self._check(tasks, self._send(tasks))
        for update in updates:
            if update.client in chosen:
                self._base[update.client] = round
        self._score(round - 1, updates)
        return updates

    def _task(self, round: int, client: int, *, fit: bool, keep: bool, evaluate: bool) -> Task:
        base = self._base.get(client, 0)
        leader = self._selection.round
        scaler = self._scaler if base == 0 else None
        return Task(round, client, base, self._shared, fit, keep, evaluate, leader, scaler)

    def _send(self, tasks: Sequence[Task]) -> dict[int, Message]:
        """The replies by client; a client that did not answer is missing."""
        with clock.part("messages"):
            shared = wire.pack_arrays(self._shared)
            messages = [
                Message(wire.pack_task(task, shared), self._nodes[task.client], wire.TRAIN, group_id=str(task.round))
                for task in tasks
            ]
            for task, message in zip(tasks, messages, strict=True):
                self._count("down", task, wire.payload(message.content))
            clients = {node: client for client, node in self._nodes.items()}
            replies = self._grid.send_and_receive(messages, timeout=self._config.federation.deadline)
            return {clients[reply.metadata.src_node_id]: reply for reply in replies}

    def _check(self, tasks: Sequence[Task], replies: dict[int, Message]) -> list[Update]:
        """The updates that may count, by client. A failure or a rejection is recorded, and ends a strict run."""
        good = []
        for task in sorted(tasks, key=lambda task: task.client):
            reply = replies.get(task.client)
            if reply is None:
                self._fail(task, f"no answer within {self._config.federation.deadline:g} s")
            elif reply.has_error():
                self._fail(task, str(reply.error.reason))
            else:
                self._count("up", task, wire.payload(reply.content))
                try:
                    update = wire.unpack_update(reply.content)
                except wire.WireError as error:
                    self._reject(task, str(error))
                    continue
                expected = self._expected[task.client]
                fault = find_fault(update, task.round, self._registered[task.client], expected, task.fit)
                if fault is None:
                    good.append(update)
                    self._recorder.time(task.round, task.client, update.seconds)
                else:
                    self._reject(task, fault)
        return good

    def _fail(self, task: Task, reason: str) -> None:
        self._failed.append({"round": task.round, "client": task.client, "reason": reason})
        self._stop_unless_tolerated(f"client {task.client} failed in round {task.round}: {reason}")

    def _reject(self, task: Task, reason: str) -> None:
        self._rejected.append({"round": task.round, "client": task.client, "reason": reason})
        self._stop_unless_tolerated(f"client {task.client}'s update of round {task.round} was rejected: {reason}")

    def _stop_unless_tolerated(self, what: str) -> None:
        if not self._config.federation.tolerate_failures:
            raise FederationError(what)
        self._progress.say(what)

    def _count(self, way: str, task: Task, size: int) -> None:
        """Bytes of the flushing message belong to the last round."""
        self._bytes[way] += size
        self._recorder.note(min(task.round, self._config.federation.rounds), task.client, **{f"bytes_{way}": size})

    def _score(self, round: int, updates: Iterable[Update]) -> None:
        """Record the scores of a round's models and see whether the round leads."""
        scored = [u for u in updates if u.validation is not None]
        validation: dict[int, Scores] = {}
        test: dict[int, Scores] = {}
        for update in scored:
            validation[update.client] = update.validation or {}
            self._recorder.note(round, update.client, validation=update.validation)
            if update.test is not None:
                test[update.client] = update.test
                self._recorder.note(round, update.client, test=update.test)
        if scored:
            if self._selection.offer(round, validation, test):
                self._selected_shared = self._shared
            mean = mean_scores(list(validation.values()))
            self._progress.scored(mean["average"])
            self._recorder.scalars(round, {f"validation/mean/{d}": s for d, s in mean.items()})
            for client, scores in validation.items():
                self._recorder.scalars(round, {f"validation/client {client}/{d}": s for d, s in scores.items()})
        self._recorder.write_up_to(round)

    def _checkpoint(self, round: int) -> None:
        """Write the server's state and every client's; those that did nothing since the last are linked."""
        out = self._recorder.out
        with clock.part("state"):
            begun = checkpoint.begin(out, round)
            everyone = self._base.keys() | set(self._panel)  # a panel member keeps models it was evaluated with
            changed = {k for k in everyone if k in self._panel or self._base[k] > self._checkpointed}
            self._ask(wire.CHECKPOINT, begun, sorted(changed))
            shared = state.prefixed("shared", self._shared) | state.prefixed("selected", self._selected_shared)
            facts = {
                "round": round,
                "base": self._base,
                "selection": self._selection.to_json(),
                "bytes": self._bytes,
                "participation": self._participation,
                "rejected": self._rejected,
                "failed": self._failed,
                "records": self._recorder.position(),
            }
            checkpoint.complete(out, round, shared, facts, sorted(everyone - changed), self._checkpointed)
        self._checkpointed = round

    def _restore(self, shared: State, facts: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, with every client that had taken part."""
        self._checkpointed = facts["round"]
        self._shared, self._selected_shared = state.under("shared", shared), state.under("selected", shared)
        self._base = {int(k): base for k, base in facts["base"].items()}
        self._selection = Selection.from_json(facts["selection"])
        self._bytes, self._participation = facts["bytes"], facts["participation"]
        self._rejected, self._failed = facts["rejected"], facts["failed"]
        everyone = sorted(self._base.keys() | set(self._panel))
        self._ask(wire.RESTORE, checkpoint.folder(self._checkpointed), everyone)
        self._progress.start_at(self._checkpointed)

    def _ask(self, kind: str, folder: str, clients: Sequence[int]) -> None:
        """Have clients write or read their states in a folder. Raises FederationError where one cannot."""
        messages = []
        for k in clients:
            asked = Checkpoint(k, self._base.get(k, 0), f"{folder}/{checkpoint.client_file(k)}")
            messages.append(Message(wire.pack_checkpoint(asked), self._nodes[k], kind))
        replies = list(self._grid.send_and_receive(messages, timeout=self._config.federation.deadline))
        if failed := [reply.error.reason for reply in replies if reply.has_error()]:
            raise FederationError(f"{kind}: {failed[0]}")
        if len(replies) < len(messages):
            raise FederationError(f"{kind}: {len(messages) - len(replies)} clients did not answer in time")

    def _record_events(self, round: int, contributions: Sequence[Contribution], weights: torch.Tensor) -> None:
        shown = [(c, w) for c, w in zip(contributions, weights.tolist(), strict=True) if c.client in self._panel]
        self._recorder.scalars(round, {f"loss/client {c.client}": c.loss for c, _ in shown})
        self._recorder.scalars(round, {f"weight/client {c.client}": w for c, w in shown})
        self._recorder.scalars(round, {f"bytes/{way}": float(n) for way, n in self._bytes.items()})
        seconds = clock.seconds()
        self._recorder.scalars(round, {f"seconds/{part}": s for part, s in seconds.items()})
        self._recorder.time(round, None, seconds)

    def _finish(self, last: int) -> None:
        """Tell every client which round was selected, gather the test scores, and write what the server holds."""
        reports = self._say_farewell(last)
        with clock.part("state"):
            out = self._recorder.out
            if self._selection.round:
                about = {"round": self._selection.round}
                state.save(out / "shared-selected.safetensors", self._selected_shared, about)
            state.save(out / "shared-last.safetensors", self._shared, {"round": last})
        summary = summarise(
            self._config,
            self._selection,
            reports,
            bytes=self._bytes,
            participation=self._participation,
            rejected=self._rejected,
            failed=self._failed,
            shared_sha256=state.sha256(self._shared),
        )
        write_json(self._recorder.out / "summary.json", summary)

    def _say_farewell(self, last: int) -> list[Report]:
        messages = []
        for client in sorted(self._base):
            measured = self._config.evaluation.every > 0 and client in self._panel
            farewell = Farewell(client, self._base[client], self._selection.round, last, measured)
            messages.append(Message(wire.pack_farewell(farewell), self._nodes[client], wire.FINISH))
        reports = []
        deadline = self._config.federation.deadline
        for reply in self._grid.send_and_receive(messages, timeout=deadline):
            if reply.has_error():
                raise FederationError(f"a client failed at the end: {reply.error.reason}")
            reports.append(wire.unpack_report(reply.content))
        if len(reports) < len(messages):
            raise FederationError(f"{len(messages) - len(reports)} clients did not answer the farewell in time")
        return sorted(reports, key=lambda r: r.client)
