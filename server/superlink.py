"""Flower's SuperLink, whose Control and Runtime APIs are for this machine alone.

Flower 1.41 serves three APIs on one port, and of these only the Fleet API, which clients use, knows who is asking. By
the Control API anybody could start a run, that is, run code on the server and on every client. So whatever comes from
another machine gets the Fleet API and nothing else.

This is the one place that uses a non-public part of Flower's server: `flwr.superlink.extensions.get_middleware`, of
which Flower builds its outermost layer. tests/unit/test_superlink.py fails where a new flwr has it no more.

    python -m server.superlink [OPTIONS OF flower-superlink]
"""

from __future__ import annotations

import os
import sys

from flwr.superlink import extensions
from flwr.superlink.cli import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedxmr.addresses import is_loopback
from fedxmr.processes import end_with_parent, search_path

GRACE = 3.0
"""Seconds it has to end; it would wait for all who are connected."""

FLEET = "/v1/fleet/"
PASSED_ON = {b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"}
"""Headers by which a proxy on this machine gives itself away: what it passes on is not from here."""


class OnlyFleetFromAfar:
    """Lets requests through that are for the Fleet API or come from this machine, and answers 403 to all others.

    own: the address the server listens at, where it is a single one; who has that address is this machine too. Where
    a server listens at all of them, the loopback addresses alone are.
    """

    def __init__(self, app: ASGIApp, own: str | None = None) -> None:
        self._app = app
        self._own = own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            line = f"{scope['path']} is served to this machine alone; other machines have {FLEET}"
            await JSONResponse({"detail": line}, 403)(scope, receive, send)  # as flwr shows it
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allows(self, scope: Scope) -> bool:
        return (scope["type"] == "http" and str(scope["path"]).startswith(FLEET)) or self._from_here(scope)

    def _from_here(self, scope: Scope) -> bool:
        if not scope.get("client") or any(name.lower() in PASSED_ON for name, _ in scope["headers"]):
            return False
        host = str(scope["client"][0])
        return is_loopback(host) or host == self._own


def guard(own: str | None = None) -> None:
    """Have Flower build its SuperLink with our layer outside all others; server.service looks whether it did."""
    others = extensions.get_middleware

    def get_middleware() -> tuple[Middleware, ...]:
        return (Middleware(OnlyFleetFromAfar, own=own), *others())

    extensions.get_middleware = get_middleware


def single(host: str) -> str | None:
    """The one address of a server that listens at `host`, or None where it listens at several or at loopback."""
    return None if host in ("0.0.0.0", "::") or is_loopback(host) else host


def main() -> None:
    """Flower's command line, guarded."""
    end_with_parent(GRACE)
    os.environ["PATH"] = search_path()
    given = dict(zip(sys.argv, sys.argv[1:], strict=False))
    guard(single(given.get("--host", "127.0.0.1")))
    flower_superlink()


if __name__ == "__main__":
    main()
