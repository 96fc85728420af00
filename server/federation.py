"""The round loop.

Round t's message carries W_{t-1} and brings back W_t^k together with the scores of round t-1; one more message flushes
the last merge and enhancement. Nothing counts before it is checked, and every failure is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from flwr.app import RecordDict

from fedxmr import checkpoint, state, wire
from fedxmr.checks import (
    check_initial_state,
    check_registrations,
    check_unchanged,
    find_fault,
    find_report_fault,
    fingerprint,
)
from fedxmr.config import Config
from fedxmr.errors import FederationError, in_one_line
from fedxmr.evaluation import mean_scores
from fedxmr.messages import Checkpoint, Farewell, Registration, Report, Task, Update
from fedxmr.participation import dropped, evaluated, panel, sampled
from fedxmr.progress import Progress
from fedxmr.recording import Recorder, write_json
from fedxmr.scaling import Scaler, combine_moments
from fedxmr.setting import build_learner, initial_state, owned_names
from fedxmr.strategies import Contribution, client_weights, combine, shared_names
from fedxmr.summary import summarise
from fedxmr.timing import clock
from fedxmr.types import State
from server.nodes import Nodes, Reply
from server.recovery import Recovery
from server.standing import Incident, Standing

Said = TypeVar("Said")


class Federation:
    """A run as the server sees it: who is there, what may be expected of each, and how far it has come."""

    def __init__(
        self,
        config: Config,
        nodes: Nodes,
        recorder: Recorder,
        progress: Progress,
        standing: Standing,
        recovery: Recovery,
    ) -> None:
        """standing: new, or that of the checkpoint to go on from. recovery: whom not to ask again, and why."""
        self._config = config
        self._nodes = nodes
        self._recorder = recorder
        self._progress = progress
        self._standing = standing
        self._recovery = recovery
        self._panel = panel(config)
        self._registered: dict[int, Registration] = {}
        self._expected: dict[int, State] = {}
        self._by_class: frozenset[str] = frozenset()
        self._scaler = Scaler({}, {})

    def run(self) -> None:
        """The whole run, or the rest of it: register, T rounds, flush, farewell."""
        last = self._config.federation.rounds
        # deployed clients keep but two states, and one of a round that the server knows of must be among them
        every = 1 if self._config.deployed else self._config.federation.checkpoint_every
        with clock.part("start_up"):
            self._start()
        for round in range(self._standing.round + 1, last + 1):
            self._round(round)
            if every and round % every == 0:
                self._checkpoint()
        self._flush(last + 1)
        self._finish(last)

    def _start(self) -> None:
        """Ask every node who it is; agree on the initial state and the standardisation; go back to a checkpoint."""
        config, resumed = self._config, self._standing.round > 0
        registrations = self._nodes.register()
        check_registrations(registrations, config.federation.clients)
        spec = registrations[0].spec
        learner = build_learner(config.learner, spec, torch.device("cpu"), None)
        names = shared_names(config.strategy, learner)
        initial = initial_state(config, spec)
        shared = {name: initial[name] for name in sorted(names)}
        check_initial_state(registrations, state.sha256(shared))
        registered = {r.client: fingerprint(r) for r in registrations}
        if resumed:
            check_unchanged(self._standing.registered, registered)
        self._standing.registered = registered
        self._by_class = learner.by_class
        for r in registrations:
            # what all have in common once, and no moments: of thousands of clients they are gigabytes
            self._registered[r.client] = replace(r, spec=spec, moments={})
            self._expected[r.client] = {n: initial[n] for n in sorted(owned_names(names, learner, r.held))}
        if config.federation.standardise != "none":
            self._scaler = _common_scaler(registrations)
        if not resumed:
            self._standing.shared = shared
        elif not config.deployed:  # there clients find the states they are asked to go on from by themselves
            self._ask_for_states(wire.RESTORE, checkpoint.folder(self._standing.round), self._everyone())
        self._progress.start_at(self._standing.round)

    def _round(self, round: int) -> None:
        """One round: a task for every sampled client that is in reach, and their updates combined into W_t."""
        standing, strategy = self._standing, self._config.strategy
        away = dropped(self._config, round)
        chosen = [k for k in sampled(self._config, round) if k not in away]
        standing.participation[str(round)] = chosen
        stood = [update for update in self._exchange(round, chosen, fit=True) if update.client in chosen]
        quorum = self._config.federation.quorum
        if len(stood) < quorum:
            why = f"; {len(away)} of {len(away) + len(chosen)} clients dropped out" if away else ""
            raise FederationError(f"round {round}: {len(stood)} good updates, expected at least {quorum}{why}")
        with clock.part("aggregation"):
            contributions = [
                Contribution(u.client, u.n, u.class_counts, u.loss, u.shared) for u in stood if u.loss is not None
            ]
            weights = client_weights(strategy, contributions)
            standing.shared = combine(standing.shared, contributions, weights, self._by_class, strategy.server_step)
        if abstained := [u.client for u in stood if u.loss is None]:
            standing.abstained[str(round)] = abstained
        standing.round = round
        self._record(round, contributions, weights.tolist())

    def _flush(self, round: int) -> None:
        """The last message: every client that took part, and the panel, merges W_T, enhances and is evaluated."""
        self._exchange(round, self._everyone(), fit=False)
        self._recorder.write_up_to(round)

    def _everyone(self) -> list[int]:
        """The clients that have taken part and the panel, which holds models it was evaluated with."""
        return sorted(self._standing.base.keys() | set(self._panel))

    def _exchange(self, round: int, chosen: Sequence[int], *, fit: bool) -> list[Update]:
        """Send the tasks of a round's message, and return what counts of the answers, by client.

        Scores of the round before are taken note of. Panel members that are not chosen are evaluated on a copy.
        """
        watched = self._panel if evaluated(self._config, round - 1) else []
        tasks = [self._task(round, k, fit=fit, keep=True, evaluate=k in watched) for k in chosen]
        tasks += [self._task(round, k, fit=False, keep=False, evaluate=True) for k in watched if k not in chosen]
        with clock.part("messages"):
            shared = wire.pack_arrays(self._standing.shared)
            contents = {
                task.client: wire.pack_task(task, shared)
                for task in tasks
                if self._recovery.given_up(wire.TRAIN, round, task.client) is None
            }
            for task in tasks:
                self._count("down", task, task.shared)
            wanted = self._config.federation.quorum if fit else len(contents)
            replies = self._nodes.exchange(wire.TRAIN, contents, round, wanted=wanted)
        updates = []
        for task in sorted(tasks, key=lambda task: task.client):
            update = self._accept(task, replies.get(task.client))
            if update is not None:
                updates.append(update)
                if task.keep:
                    self._standing.base[task.client] = round
        self._score(round - 1, updates)
        return updates

    def _task(self, round: int, client: int, *, fit: bool, keep: bool, evaluate: bool) -> Task:
        standing = self._standing
        base = standing.base.get(client, 0)
        scaler = self._scaler if base == 0 else None
        return Task(round, client, base, standing.shared, fit, keep, evaluate, standing.selection.round, scaler)

    def _accept(self, task: Task, reply: Reply | None) -> Update | None:
        """The update in a reply, if it may count; else that is noted."""
        update = self._read(wire.TRAIN, task.round, task.client, reply, wire.unpack_update)
        if update is None:
            return None
        self._count("up", task, update.shared)
        own, paper = self._expected[task.client], self._config.evaluation.protocol == "paper"
        if fault := find_fault(update, task, self._registered[task.client], own, test=paper):
            self._reject(task.round, task.client, fault)
            return None
        self._recorder.time(task.round, task.client, update.seconds)
        return update

    def _read(
        self, kind: str, round: int, client: int, reply: Reply | None, unpack: Callable[[RecordDict], Said]
    ) -> Said | None:
        """What a reply says; None, and that is noted, where it says nothing or not what it should.

        reply: None of a client that was not asked again.
        """
        reply = reply or Reply(failed=self._recovery.given_up(kind, round, client))
        if reply.failed is not None:
            self._note(self._standing.failed, round, client, "failed", reply.failed)
            return None
        try:
            return reply.read(unpack)
        except wire.WireError as error:
            self._reject(round, client, str(error))
            return None

    def _reject(self, round: int, client: int, fault: str) -> None:
        self._note(self._standing.rejected, round, client, "was rejected", fault)

    def _note(self, incidents: list[Incident], round: int, client: int, what: str, reason: str) -> None:
        """Note a failure or a rejection. Raises FederationError where one ends the run."""
        reason = in_one_line(reason)
        incidents.append({"round": round, "client": client, "reason": reason})
        line = f"client {client} {what} in round {round}: {reason}"
        if not self._config.tolerant:
            raise FederationError(line)
        self._progress.say(line)

    def _count(self, way: str, task: Task, arrays: State) -> None:
        """Count the shared arrays of clients that take part; evaluating others is measurement, not traffic.

        Those of the flushing message belong to the last round.
        """
        if not (task.fit or (task.keep and task.base)):
            return
        size = sum(array.nbytes for array in arrays.values())
        self._standing.bytes[way] += size
        self._recorder.note(min(task.round, self._config.federation.rounds), task.client, **{f"bytes_{way}": size})

    def _score(self, round: int, updates: Sequence[Update]) -> None:
        """Record the scores of a round's models and see whether the round leads; then the round's records are whole."""
        validation = {u.client: u.validation for u in updates if u.validation is not None}
        test = {u.client: u.test for u in updates if u.test is not None}
        for part, by_client in (("validation", validation), ("test", test)):
            for client, scores in by_client.items():
                self._recorder.note(round, client, **{part: scores})
        if validation:
            if self._standing.selection.offer(round, validation, test):
                self._standing.selected_shared = self._standing.shared
            mean = mean_scores(list(validation.values()))
            self._progress.scored(mean["average"])
            for who, scores in {"mean": mean, **{f"client {k}": s for k, s in validation.items()}}.items():
                self._recorder.scalars(round, {f"validation/{who}/{d}": score for d, score in scores.items()})
        self._recorder.write_up_to(round)

    def _record(self, round: int, contributions: Sequence[Contribution], weights: Sequence[float]) -> None:
        """What the round's training gave, for the records, TensorBoard and the progress bar."""
        for contribution, weight in zip(contributions, weights, strict=True):
            client, loss = contribution.client, contribution.loss
            self._recorder.note(round, client, loss=loss, weight=weight)
            if client in self._panel:
                self._recorder.scalars(round, {f"loss/client {client}": loss, f"weight/client {client}": weight})
        seconds = clock.seconds()
        self._recorder.scalars(round, {"clients/took part": len(contributions)})
        self._recorder.scalars(round, {f"bytes/{way}": size for way, size in self._standing.bytes.items()})
        self._recorder.scalars(round, {f"seconds/{part}": spent for part, spent in seconds.items()})
        self._recorder.scalars(
            round, {f"busy/worker {w}": spent for w, spent in self._nodes.activity.take_busy().items()}
        )
        self._recorder.time(round, None, seconds)
        losses = [contribution.loss for contribution in contributions]
        self._progress.trained(round, sum(losses) / len(losses) if losses else None)

    def _checkpoint(self) -> None:
        """Write the server's standing and every client's state; a client that did nothing since the last is linked.

        In a deployment the standing alone: clients have their states already, on their own machines.
        """
        standing, out = self._standing, self._recorder.out
        with clock.part("state"):
            before = max(checkpoint.rounds(out), default=0)
            everyone = [] if self._config.deployed else self._everyone()
            changed = [k for k in everyone if k in self._panel or standing.base[k] > before]
            self._ask_for_states(wire.CHECKPOINT, checkpoint.begin(out, standing.round), changed)
            checkpoint.complete(
                out,
                self._nodes.experiment,
                standing.tensors(),
                standing.facts(self._recorder.position()),
                until=self._config.federation.rounds,
                unchanged=sorted(set(everyone) - set(changed)),
                before=before,
            )

    def _ask_for_states(self, kind: str, folder: str, clients: Sequence[int]) -> None:
        """Have clients write their states into a folder of the run folder, or go back to the ones there."""
        asked = {
            k: Checkpoint(k, self._standing.base.get(k, 0), f"{folder}/{checkpoint.client_file(k)}") for k in clients
        }
        self._nodes.ask(kind, asked, self._standing.round)

    def _finish(self, last: int) -> None:
        """Tell every client which round was selected, gather the test scores, and write what the server holds."""
        standing, out = self._standing, self._recorder.out
        reports = self._say_farewell(last)
        with clock.part("state"):
            if selected := standing.selection.round:
                state.save(out / "shared-selected.safetensors", standing.selected_shared, {"round": selected})
            state.save(out / "shared-last.safetensors", standing.shared, {"round": last})
        summary = summarise(
            self._config,
            standing.selection,
            reports,
            engine=self._nodes.engine,
            bytes=standing.bytes,
            participation=standing.participation,
            abstained=standing.abstained,
            rejected=standing.rejected,
            failed=standing.failed,
            recovered=standing.recovered,
            shared_sha256=state.sha256(standing.shared),
        )
        write_json(out / "summary.json", summary)

    def _say_farewell(self, last: int) -> list[Report]:
        """The reports of all clients that took part, by client."""
        farewells = {
            # one that failed in the last message has no model of the last round to measure
            k: Farewell(k, base, self._standing.selection.round, last, evaluate=k in self._panel and base > last)
            for k, base in sorted(self._standing.base.items())
        }
        contents = {
            k: wire.pack_farewell(farewell)
            for k, farewell in farewells.items()
            if self._recovery.given_up(wire.FINISH, last + 1, k) is None
        }
        replies = self._nodes.exchange(wire.FINISH, contents, last + 1, wanted=len(contents))
        scored = self._standing.selection.selected
        reports = []
        for client, farewell in farewells.items():
            report = self._read(wire.FINISH, last + 1, client, replies.get(client), wire.unpack_report)
            if report is None:
                continue
            measured = scored is not None and client in scored.validation
            if fault := find_report_fault(report, farewell, self._registered[client], measured):
                self._reject(last + 1, client, f"final report: {fault}")
            else:
                reports.append(report)
        if not reports:
            raise FederationError("no client gave its final model")
        return reports


def _common_scaler(registrations: Sequence[Registration]) -> Scaler:
    """The standardisation of the pooled features, from every client's moments, in client order."""
    modalities = sorted({m for r in registrations for m in r.moments})
    return Scaler.of({m: combine_moments([r.moments[m] for r in registrations if m in r.moments]) for m in modalities})
