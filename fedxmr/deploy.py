"""`python -m fedxmr.deploy`: a federation between institutions, over Flower's SuperLink and SuperNodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fedxmr import commands
from fedxmr.commands import configure, option, say
from fedxmr.errors import InputError

if TYPE_CHECKING:
    from fedxmr.config import Config
    from fedxmr.flower import Flower
    from fedxmr.submission import Link

Keys = Annotated[Path | None, option("the folder of its key and certificates")]
State = Annotated[Path, option("the folder for what it keeps, made if need be")]
Insecure = Annotated[bool, option("without TLS and keys, on this machine alone", "--insecure")]
Server = Annotated[str, option("the server's host:port, such as 127.0.0.1:8443 on its own machine")]
CertificateOfCA = Annotated[Path | None, option("ca.crt, by which the server is known", "--ca")]
RunId = Annotated[int, commands.typer.Argument(metavar="RUN_ID", help="Flower's number of the run")]


def keys(
    out: Annotated[Path, option("the folder they are written to")],
    name: Annotated[list[str] | None, option("a host name or IP address of the server, as clients write it")] = None,
    renew: Annotated[bool, option("a new certificate for the server's key, by the same authority", "--renew")] = False,
    days: Annotated[int, commands.typer.Option(min=1, help="that the server's certificate is valid")] = 825,
    client: Annotated[str | None, option("make this client's own key pair, on its own machine")] = None,
    clients: Annotated[int, commands.typer.Option(min=0, help="make keys of so many clients at once, for a trial")] = 0,
) -> None:
    """Make keys: with --name the server's and the authority's, with --client one client's own.

    Private keys are files NAME.key for their owner alone, and are never overwritten. A client sends its NAME.pub to the
    server's administrator and gets ca.crt; nothing else is exchanged.
    """
    from fedxmr import keys as making

    if client is not None and (name or renew or clients):
        raise InputError("--client: makes a client's own key alone, expected no --name, --renew or --clients")
    if client is not None:
        private, public = making.write_client(out, client)
        say(f"wrote {private}, which stays here\nwrote {public}, to be sent to the server's administrator")
        return
    if not (name or renew or clients):
        raise InputError("keys: expected --name HOST for a server, or --client NAME for a client")
    written = []
    if renew:
        written += making.renew_server(out, name or [], days)
    elif name:
        written += making.write_server(out, name, days)
    written += making.write_trial(out, clients) if clients else []
    for file in written:
        say(f"wrote {file}")


def server(
    state: State,
    keys: Keys = None,
    clients: Annotated[
        Path | None, option("the folder of the clients' public keys, NAME.pub; it says who is let in")
    ] = None,
    host: Annotated[str, option("the address to listen at; default: all of this machine's")] = "0.0.0.0",
    port: Annotated[int, commands.typer.Option(min=1, max=65535, help="the port to listen at")] = 8443,
    insecure: Insecure = False,
) -> None:
    """Run the server until it is ended. Who comes with a key in --clients is let in, also while it runs.

    A key that is taken away from --clients is unregistered, for good. Runs are submitted on this machine alone.
    """
    from fedxmr.addresses import Address
    from server.service import Service, serve

    if insecure == (keys is not None and clients is not None):
        raise InputError("expected --keys and --clients, or else --insecure")
    if insecure and (keys or clients):
        raise InputError("--insecure: knows no keys, expected neither --keys nor --clients")
    folders = [path and path.absolute() for path in (keys, clients)]
    serve(Service(Address(host, port), state.absolute(), *folders))


def client(
    client: Annotated[int, commands.typer.Option(min=0, help="its number, from 0, which no other client has")],
    server: Annotated[str, option("the server's host:port")],
    data: Annotated[Path, option("the folder of its data, as fedxmr/data/folder.py describes it")],
    state: State,
    keys: Annotated[Path | None, option("the folder of ca.crt and this client's one private key, NAME.key")] = None,
    threads: Annotated[
        int | None, commands.typer.Option(min=1, help="of torch; default: a thread for every core", show_default=False)
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Run a client until it is ended: it connects to the server, waits for runs, and takes part in them.

    It only connects, and listens to nobody but itself. However it ends, it is started again.
    """
    from clients.supernode import Node, serve
    from fedxmr.addresses import Address

    if insecure == (keys is not None):
        raise InputError("expected --keys, or else --insecure")
    address = Address.parse(server, "--server")
    serve(Node(client, address, data.absolute(), state.absolute(), keys and keys.absolute(), threads))


def leaves(
    assignments: commands.Assignments = None,
    config: commands.ConfigFile = None,
    strategy: Annotated[str | None, option("fedcmr (default), fedavg, fedprox or local")] = None,
    learner: commands.LearnerName = None,
    data: Annotated[Path | None, option("the client's folder; without it the sizes are those of made-up data")] = None,
) -> None:
    """Print what leaves a client's machine in a run of this configuration, and what does not."""
    from fedxmr.data import load_dataset
    from fedxmr.disclosure import describe, disclosure

    options = {"strategy.name": strategy, "learner.name": learner}
    if data is None:
        say("no --data: sizes are those of made-up images and texts; with a client's folder they are its own\n")
    checked = configure(config, options, assignments)
    found = load_dataset("synthetic") if data is None else load_dataset(str(data.absolute()))
    for line in describe(checked, disclosure(checked, found)):
        say(line)


def status(state: Annotated[Path, option("the server's --state")]) -> None:
    """Say of each client that the server knows whether it is online."""
    from server.service import registry_of

    statuses = registry_of(state.absolute()).statuses()
    for name, is_now in sorted(statuses.items()):
        say(f"{name}: {is_now}")


def run(
    server: Server,
    out: Annotated[Path, option("the run folder, an absolute path; what began there goes on")],
    assignments: commands.Assignments = None,
    config: commands.ConfigFile = None,
    strategy: Annotated[str | None, option("fedcmr (default), fedavg, fedprox or local")] = None,
    learner: commands.LearnerName = None,
    rounds: commands.Rounds = None,
    seed: commands.Seed = None,
    ca: CertificateOfCA = None,
    insecure: Insecure = False,
) -> None:
    """Submit a run, on the server's own machine, and follow it to its end; the exit code is the run's.

    Later settings win: defaults, the strategy's preset, --config, options, KEY=VALUE. Ctrl-C ends the following, not
    the run. What is submitted runs on the server and on every client: the fedxmr that is installed here.
    """
    options = {
        "strategy.name": strategy,
        "learner.name": learner,
        "federation.rounds": rounds,
        "seed": seed,
    }
    if not out.is_absolute():
        raise InputError(f"--out {str(out)!r}: expected an absolute path, on the server's machine")
    text = _deployed(config, options, assignments).to_yaml()
    link = _link(server, ca, insecure)
    from fedxmr.submission import submit

    with link.open() as flower:
        number = submit(flower, text, out)
        say(f"run {number}: submitted to {link.server}, with run folder {out}")
        _follow(flower, link, number)


def follow(run: RunId, server: Server, ca: CertificateOfCA = None, insecure: Insecure = False) -> None:
    """Show what a run says, from its beginning to its end; the exit code is the run's."""
    link = _link(server, ca, insecure)
    with link.open() as flower:
        _follow(flower, link, str(run))


def stop(run: RunId, server: Server, ca: CertificateOfCA = None, insecure: Insecure = False) -> None:
    """Stop a run. What it has done up to its last checkpoint stays; submitted again, it goes on from there."""
    from fedxmr.submission import end

    with _link(server, ca, insecure).open() as flower:
        end(flower, str(run))
    say(f"run {run}: stopped")


def _deployed(file: Path | None, options: Mapping[str, Any], assignments: list[str] | None) -> Config:
    """The configuration of a run in which every client has its own data. Raises InputError."""
    from fedxmr.config import override, read_yaml
    from fedxmr.data.own_folder import NAME

    named = override(read_yaml(file) if file else {}, assignments or []).get("dataset")
    chosen = isinstance(named, str) or (isinstance(named, Mapping) and "name" in named)
    config = configure(file, {**options, "dataset.name": None if chosen else NAME}, assignments)
    if not config.deployed:
        raise InputError(f"dataset.name: expected {NAME}, as every client has its own data, got {config.dataset.name}")
    return config


def _link(server: str, ca: Path | None, insecure: bool) -> Link:
    from fedxmr.addresses import Address
    from fedxmr.submission import Link

    address = Address.parse(server, "--server")
    if insecure == (ca is not None):
        raise InputError("expected --ca, or else --insecure")
    if insecure and not address.local:
        raise InputError(f"--insecure: expected a server on this machine such as 127.0.0.1:8443, got {address}")
    return Link(address, ca and ca.absolute())


def _follow(flower: Flower, link: Link, run: str) -> None:
    """Follow a run, and end as it ends."""
    from fedxmr.processes import show
    from fedxmr.submission import LostSight, expect_success, follow

    try:
        code = follow(flower, run, show)
    except (KeyboardInterrupt, LostSight) as error:
        again = f"python -m fedxmr.deploy {{}} {run} {link.options}"
        error.add_note(f"the run goes on by itself; to follow it again: {again.format('follow')}")
        error.add_note(f"to end it: {again.format('stop')}")
        raise
    expect_success(run, code)


if __name__ == "__main__":
    several: dict[str, commands.Command] = {
        "keys": keys,
        "server": server,
        "client": client,
        "run": run,
        "follow": follow,
        "stop": stop,
        "leaves": leaves,
        "status": status,
    }
    commands.main(several, about=__doc__)
