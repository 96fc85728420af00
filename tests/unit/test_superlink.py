"""Other machines get a SuperLink's Fleet API and nothing else: neither runs nor nodes can be submitted from afar.

The guard hangs on a non-public part of Flower's; these tests fail where a new flwr has it no more.
"""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from flwr.superlink import extensions, main
from starlette.responses import PlainTextResponse

from fedxmr.addresses import free_port
from server.superlink import OnlyFleetFromAfar, guard, single

AFAR, HERE = ("203.0.113.9", 4711), ("127.0.0.1", 4711)
START_RUN, PULL = "/v1/control/start-run", "/v1/fleet/pull-messages"


def status(path, client, headers=(), own=None, kind="http") -> int | str:
    """What a request gets: a status, or "close" of a web socket."""
    sent = []

    async def send(message) -> None:
        sent.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": kind, "path": path, "method": "POST", "headers": list(headers), "client": client}
    application = OnlyFleetFromAfar(PlainTextResponse("served"), own)
    asyncio.run(application(scope, receive, send))
    return sent[0].get("status", "close")


@pytest.mark.parametrize(
    "path", [START_RUN, "/v1/control/register-node", "/v1/runtime/acquire-task", "/health", "/docs"]
)
def test_only_this_machine_gets_more_than_the_fleet_api(path):
    assert status(path, HERE) == 200
    assert status(path, AFAR) == 403
    assert status(PULL, AFAR) == status(PULL, HERE) == 200


@pytest.mark.parametrize(
    "path", ["/v1/fleet", "/V1/FLEET/x", "//v1/fleet/x", "/v1/control/v1/fleet/", "/v1/fleetx/", "", "/"]
)
def test_what_merely_looks_like_the_fleet_api_is_refused(path):
    assert status(path, AFAR) == 403


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("127.9.9.9", 1), 200),
        (("::1", 1), 200),
        (("::ffff:127.0.0.1", 1), 200),
        (("::ffff:203.0.113.9", 1), 403),
        (("10.77.0.1", 1), 403),
        (("0.0.0.0", 1), 403),
        (("localhost.example.org", 1), 403),
        (("testclient", 1), 403),
        (None, 403),
    ],
)
def test_loopback_addresses_alone_are_this_machine(client, expected):
    assert status(START_RUN, client) == expected


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"Forwarded", b"X-Real-IP", b"via"])
def test_what_a_proxy_on_this_machine_passes_on_is_not_from_here(header):
    assert status(START_RUN, HERE, [(header, b"127.0.0.1")]) == 403
    assert status(PULL, HERE, [(header, b"127.0.0.1")]) == 200


def test_a_web_socket_from_afar_is_closed():
    assert status(PULL, AFAR, kind="websocket") == "close"


def test_where_a_server_has_one_address_who_has_it_is_this_machine():
    assert (single("10.77.0.1"), single("0.0.0.0"), single("::"), single("127.0.0.1")) == (
        "10.77.0.1",
        None,
        None,
        None,
    )
    assert status(START_RUN, ("10.77.0.1", 1), own="10.77.0.1") == 200
    assert status(START_RUN, ("10.77.0.2", 1), own="10.77.0.1") == 403


@pytest.fixture
def flowers(monkeypatch) -> FastAPI:
    """Flower's SuperLink as it is built behind the guard."""
    monkeypatch.setattr(extensions, "get_middleware", extensions.get_middleware)  # what it was, afterwards
    guard()
    return main.create_app()


def post(app: FastAPI, path: str, client: tuple[str, int], **headers: str) -> httpx.Response:
    """Send a request to an application as if from an address."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="https://server") as opened:
            return await opened.post(path, headers=headers)

    return asyncio.run(send())


def test_flower_puts_the_guard_outside_all_its_own(flowers):
    assert flowers.user_middleware[0].cls is OnlyFleetFromAfar


def test_no_route_of_flowers_is_open_to_other_machines_but_the_fleets(flowers):
    routes = [context.route for context in iter_route_contexts(flowers.routes)]
    paths = {route.path for route in routes if isinstance(route, APIRoute)}
    assert {START_RUN, PULL, "/v1/control/register-node"} <= paths
    for path in sorted(paths):
        refused = post(flowers, path, AFAR).status_code == 403
        assert refused != path.startswith("/v1/fleet/"), path
    assert post(flowers, START_RUN, HERE).status_code == 415  # it got through, to who wants a protobuf
    detail = post(flowers, START_RUN, AFAR).json()["detail"]
    assert detail.startswith("/v1/control/start-run is served to this machine alone")


def test_flowers_fleet_api_asks_who_comes(flowers):
    flowers.state.enable_supernode_auth = True
    protobuf = "application/protobuf"
    answer = post(flowers, PULL, AFAR, **{"content-type": protobuf, "accept": protobuf})
    assert answer.status_code == 401, answer.text


@contextmanager
def listening() -> Iterator[int]:
    """A guarded application at a port of 127.0.0.1."""
    port = free_port()
    application = OnlyFleetFromAfar(PlainTextResponse("served"))
    config = uvicorn.Config(application, "127.0.0.1", port, log_level="critical", ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join(30)


def test_over_a_real_connection():
    """The header is what uvicorn believes of a proxy on this machine."""
    with listening() as port:
        for headers, expected in (({}, 200), ({"X-Forwarded-For": "203.0.113.9"}, 403)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", START_RUN, headers=headers)
            assert connection.getresponse().status == expected
            connection.close()
