"""Network addresses: host:port, what is this machine alone, and what stands between us and a server."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fedxmr.errors import InputError, one_line


@dataclass(frozen=True)
class Address:
    """Where a server listens: a host name or IP address, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, option: str) -> Address:
        """From "host:port" or "[::1]:port". option: whose value it is, for the error. Raises InputError."""
        host, _, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InputError(f"{option} {text!r}: expected host:port, such as server.example.org:8443")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether only this machine can be meant."""
        return is_loopback(self.host)

    @property
    def reached_at(self) -> Address:
        """By which address processes of this machine reach a server that listens here."""
        return Address(
            {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(self.host, self.host), self.port
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, whatever the network says; of names, localhost alone."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def expect_ip(host: str, option: str) -> None:
    """Raises InputError where a host is no IP address, nor localhost."""
    if host == "localhost":
        return
    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise InputError(
            f"{option} {host!r}: expected an IP address of this machine, or 0.0.0.0 for all of them"
        ) from error


def expect_free(address: Address) -> None:
    """Raises InputError where nobody can listen at an address."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does it
        try:
            opened.bind((address.host, address.port))
        except OSError as error:
            raise InputError(f"{address}: cannot be listened at: {error.strerror or error}") from error


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens at the moment."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def obstacle(address: Address, authority: Path | None, timeout: float = 10.0) -> str | None:
    """Why a server cannot be talked to from here, in one line; None where it can, or only a proxy could tell.

    authority: the certificate of the one who must have signed the server's; None: without TLS.
    """
    if not address.local and urllib.request.getproxies().get("https" if authority else "http"):
        return None
    try:
        with socket.create_connection((address.host, address.port), timeout) as opened:
            if authority is not None:
                trusting = ssl.create_default_context(cafile=authority)
                trusting.wrap_socket(opened, server_hostname=address.host).close()
    except OSError as error:
        return _why(error, address)
    return None


def _why(error: OSError, address: Address) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"the certificate of {address} is not accepted: {error.verify_message}"
        case ssl.SSLError():
            return f"no TLS at {address}: {error.reason or one_line(error)}"
        case TimeoutError():
            return f"no answer from {address}"
    return f"{address} cannot be reached: {error.strerror or one_line(error)}"
