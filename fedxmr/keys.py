"""The keys and certificates of a deployment.

ca.crt, ca.key          our own certificate authority: who holds ca.key can make certificates that every client believes
server.pem, server.key  what the server shows clients: a certificate of that authority, with the server's names
NAME.key, NAME.pub      a client's own key pair, in OpenSSH's format; only the public half ever leaves its machine

Everything is ECDSA on P-384. Private files are for their owner alone, and no private key is ever overwritten.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedxmr.errors import InputError
from fedxmr.folders import replace

CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.pem", "server.key"
ALWAYS = ("localhost", "127.0.0.1", "::1")
"""The names of every server certificate: the run's server side reaches the SuperLink by them."""

CA_DAYS, SERVER_DAYS = 3650, 825
CLOCKS = timedelta(hours=1)
"""How far another machine's clock may be behind ours for a new certificate to count there."""

Curve = ec.SECP384R1
_HOST = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62}(?<!-))?(\.[a-z0-9_]([a-z0-9_-]{0,62}(?<!-))?)*", re.I)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Pair:
    """A certificate and the private key that belongs to it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Period:
    """From when to when a certificate is valid."""

    begin: datetime
    end: datetime

    @classmethod
    def of(cls, days: int) -> Period:
        """From now on, for so many days."""
        now = datetime.now(UTC)
        return cls(now - CLOCKS, now + timedelta(days=days))


def make_authority(period: Period | None = None) -> Pair:
    """A new certificate authority, which may sign servers' certificates and no other authority."""
    period = period or Period.of(CA_DAYS)
    key = ec.generate_private_key(Curve())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedxmr CA {period.begin:%Y-%m-%d}")])
    usage = _usage(digital_signature=False, key_cert_sign=True, crl_sign=True)
    builder = (
        _builder(name, name, key.public_key(), period)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    return Pair(builder.sign(key, hashes.SHA384()), key)


def make_server(
    authority: Pair, names: Sequence[str], period: Period | None = None, key: ec.EllipticCurvePrivateKey | None = None
) -> Pair:
    """A server's certificate for these host names and IP addresses, and ALWAYS.

    key: the key it is to have; by default a new one. It never outlives the authority. Raises InputError for a bad name.
    """
    alternatives = x509.SubjectAlternativeName([_general(name) for name in dict.fromkeys((*names, *ALWAYS))])
    period = period or Period.of(SERVER_DAYS)
    key = key or ec.generate_private_key(Curve())
    end = min(period.end, authority.certificate.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, (*names, "fedxmr server")[0][:64])])
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        _builder(subject, authority.certificate.subject, key.public_key(), Period(period.begin, end))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(signer, critical=False)
    )
    return Pair(builder.sign(authority.key, hashes.SHA384()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, period: Period
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(period.begin)
        .not_valid_after(period.end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, digital_signature: bool, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    """A name as a certificate has it. Raises InputError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if _HOST.fullmatch(name) is None or name.rpartition(".")[2].isdigit():
            raise InputError(f"--name {name!r}: expected a host name or an IP address") from None
        return x509.DNSName(name)


def names_of(certificate: x509.Certificate) -> list[str]:
    """The host names and IP addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def write_server(folder: Path, names: Sequence[str], days: int = SERVER_DAYS) -> list[Path]:
    """Make a server's key and certificate, and an authority where the folder has none; returns what was written.

    Raises InputError where there is a server's key or certificate already, or half an authority.
    """
    _expect_none(folder, [SERVER, SERVER_KEY])
    new = not ((folder / CA).exists() or (folder / CA_KEY).exists())
    authority = make_authority() if new else read_authority(folder)
    server = make_server(authority, names, Period.of(days))
    files = {CA_KEY: _private_pem(authority.key), CA: _pem(authority.certificate)} if new else {}
    return _write(folder, {**files, SERVER_KEY: _private_pem(server.key), SERVER: _pem(server.certificate)})


def renew_server(folder: Path, names: Sequence[str], days: int = SERVER_DAYS) -> list[Path]:
    """A new certificate for the server's key, by the same authority; returns what was written.

    names: by default those of the certificate there is. Raises InputError.
    """
    authority = read_authority(folder)
    key = read_private_pem(folder / SERVER_KEY)
    if not names:
        names = [name for name in names_of(read_certificate(folder / SERVER)) if name not in ALWAYS]
    renewed = make_server(authority, names, Period.of(days), key)
    try:
        replace(folder / SERVER, _pem(renewed.certificate))
    except OSError as error:
        raise InputError(f"{folder / SERVER}: cannot be written: {error.strerror or error}") from error
    return [folder / SERVER]


def write_client(folder: Path, name: str) -> list[Path]:
    """Make a client's own key pair; returns the files, the public one last. Raises InputError where there is one."""
    if _NAME.fullmatch(name) is None or name in ("ca", "server"):
        raise InputError(f"--client {name!r}: expected a name of letters, digits, '.', '_' and '-', not ca or server")
    _expect_none(folder, [f"{name}.key", f"{name}.pub"])
    key = ec.generate_private_key(Curve())
    openssh = serialization.Encoding.OpenSSH
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(openssh, serialization.PublicFormat.OpenSSH)
    return _write(folder, {f"{name}.key": private, f"{name}.pub": public + f" {name}\n".encode()})


def write_trial(folder: Path, count: int) -> list[Path]:
    """Keys of so many clients at once, for a trial where one person plays all parts; returns what was written.

    client-K/ is what client K needs, clients/ the public halves, for the server. Raises InputError.
    """
    names = [f"client-{k}" for k in range(count)]
    for name in names:
        _expect_none(folder / name, [f"{name}.key", CA])
        _expect_none(folder / "clients", [f"{name}.pub"])
    written = []
    for name in names:
        *private, public = write_client(folder / name, name)
        written += [*private, *_write(folder / name, {CA: (folder / CA).read_bytes()})]
        written += _write(folder / "clients", {public.name: public.read_bytes()})
    return written


def read_authority(folder: Path) -> Pair:
    """The authority in a folder. Raises InputError where one is missing or bad, or they do not belong together."""
    pair = Pair(read_certificate(folder / CA), read_private_pem(folder / CA_KEY))
    _expect_match(folder / CA, pair.certificate, folder / CA_KEY, pair.key)
    return pair


def check_authority(file: Path, now: datetime | None = None) -> x509.Certificate:
    """The certificate of an authority, valid now. Raises InputError."""
    certificate = read_certificate(file)
    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if not is_authority:
        raise InputError(f"{file}: expected the certificate of an authority, got that of a server")
    _expect_valid(file, certificate, now)
    return certificate


def check_server(folder: Path, host: str, now: datetime | None = None) -> x509.Certificate:
    """See that the server's files can serve clients now; the certificate.

    host: the address by which the server's own processes reach it. Raises InputError for the first thing that is wrong.
    """
    authority = check_authority(folder / CA, now)
    file = folder / SERVER
    certificate = read_certificate(file)
    _expect_valid(file, certificate, now)
    _expect_match(file, certificate, folder / SERVER_KEY, read_private_pem(folder / SERVER_KEY))
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InputError(f"{file}: expected a certificate by the authority of {folder / CA}") from error
    if host not in names_of(certificate):
        names = ", ".join(names_of(certificate))
        raise InputError(f"{file}: expected a certificate for {host}, got one for {names} (keys --renew --name {host})")
    return certificate


def read_certificate(file: Path) -> x509.Certificate:
    """The certificate in a PEM file. Raises InputError."""
    content = _read(file)
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise InputError(f"{file}: expected a certificate in PEM format") from error


def read_private_pem(file: Path) -> ec.EllipticCurvePrivateKey:
    """The unencrypted private key in a PEM file. Raises InputError."""
    return _expect_curve(
        file, _loaded(file, serialization.load_pem_private_key, "an unencrypted private key in PEM format")
    )


def read_client_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """A client's unencrypted private key, in OpenSSH's format. Raises InputError."""
    what = "an unencrypted private key in OpenSSH's format"
    return _expect_curve(file, _loaded(file, serialization.load_ssh_private_key, what))


def read_public(file: Path) -> str:
    """A client's public key as one line in OpenSSH's format, without its comment. Raises InputError."""
    what = "a public ECDSA key in OpenSSH's format (ecdsa-sha2-...)"
    content = _read(file)
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{file}: expected {what}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(f"{file}: expected {what}, got another kind of key")
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def exposed(file: Path) -> bool:
    """Whether others than its owner can read a file."""
    return bool(file.stat().st_mode & 0o077)


def _loaded(file: Path, load: Callable[[bytes, bytes | None], object], what: str) -> object:
    content = _read(file)
    try:
        return load(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it needs a password
        raise InputError(f"{file}: expected {what}") from error


def _expect_curve(file: Path, key: object) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{file}: expected an ECDSA key, got another kind of key")
    return key


def _expect_match(file: Path, certificate: x509.Certificate, key_file: Path, key: ec.EllipticCurvePrivateKey) -> None:
    if certificate.public_key() != key.public_key():
        raise InputError(f"{file}: expected the certificate of the key in {key_file}, got that of another key")


def _expect_valid(file: Path, certificate: x509.Certificate, now: datetime | None) -> None:
    now = now or datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise InputError(f"{file}: expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if now < certificate.not_valid_before_utc:
        raise InputError(f"{file}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")


def _expect_none(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).exists():
            raise InputError(f"{folder / name}: already exists, and no key is ever overwritten")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write new files, those that end in .key for their owner alone, in a folder that is made if need be.

    Raises InputError, and then leaves none of them.
    """
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, content in files.items():
            mode = 0o600 if name.endswith(".key") else 0o644
            with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
                written.append(folder / name)
                opened.write(content)
    except OSError as error:
        for path in written:
            path.unlink()
        raise InputError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
    return written
