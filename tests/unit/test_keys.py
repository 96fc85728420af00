"""Keys and certificates: what is made is believed where it should be and nowhere else, and nothing is overwritten."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedxmr import commands, keys
from fedxmr.deploy import keys as command
from fedxmr.errors import InputError

NOW = datetime.now(UTC)
PAST = keys.Period(NOW - timedelta(days=9), NOW - timedelta(days=1))
FUTURE = keys.Period(NOW + timedelta(days=1), NOW + timedelta(days=9))


@pytest.fixture
def folder(tmp_path) -> Path:
    """The files of an authority and a server."""
    keys.write_server(tmp_path / "keys", ["server.example.org", "10.77.0.1"])
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("name", ["server.example.org", "localhost"])
def test_a_certificate_is_believed_for_its_names_and_no_others(folder, name):
    authority, server = (keys.read_certificate(folder / file) for file in (keys.CA, keys.SERVER))
    verifier = PolicyBuilder().store(Store([authority]))
    verifier.build_server_verifier(x509.DNSName(name)).verify(server, [])
    with pytest.raises(VerificationError):
        verifier.build_server_verifier(x509.DNSName("other.example.org")).verify(server, [])
    stranger = Store([keys.make_authority().certificate])
    with pytest.raises(VerificationError):
        PolicyBuilder().store(stranger).build_server_verifier(x509.DNSName(name)).verify(server, [])


def shake_hands(folder: Path, authority: Path, name: str) -> str:
    """Connect to a TLS server with the keys of `folder`; the server's greeting."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / keys.SERVER, folder / keys.SERVER_KEY)
    trusting = ssl.create_default_context(cafile=authority)
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)

        def greet() -> None:
            accepted, _ = listening.accept()
            accepted.settimeout(20)
            with accepted:
                try:
                    with serving.wrap_socket(accepted, server_side=True) as secured:
                        secured.sendall(b"hello")
                except OSError:  # the other side hung up
                    return

        thread = threading.Thread(target=greet)
        thread.start()
        try:
            with (
                socket.create_connection(listening.getsockname(), timeout=20) as opened,
                trusting.wrap_socket(opened, server_hostname=name) as secured,
            ):
                return secured.recv(5).decode()
        finally:
            thread.join(20)


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "localhost", "10.77.0.1", "server.example.org"])
def test_tls_takes_the_certificate_strictly_checked(folder, name):
    assert shake_hands(folder, folder / keys.CA, name) == "hello"


def test_tls_refuses_another_name_and_another_authority(folder, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, folder / keys.CA, "10.77.0.2")
    keys.write_server(tmp_path / "others", ["server.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(folder, tmp_path / "others" / keys.CA, "server.example.org")


def test_private_files_are_for_their_owner_alone(folder):
    keys.write_client(folder / "client", "hospital-a")
    assert mode(folder) == mode(folder / "client") == 0o700
    private = [*folder.rglob("*.key")]
    assert len(private) == 3
    assert {mode(file) for file in private} == {0o600}
    assert not any(keys.exposed(file) for file in private)
    private[0].chmod(0o640)
    assert keys.exposed(private[0])


def test_nothing_is_overwritten(folder):
    keys.write_client(folder, "a")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for make in (lambda: keys.write_server(folder, ["x"]), lambda: keys.write_client(folder, "a")):
        with pytest.raises(InputError, match="already exists"):
            make()
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_renewed_certificate_has_the_names_and_the_key_of_the_old_one(folder):
    old, key = keys.read_certificate(folder / keys.SERVER), (folder / keys.SERVER_KEY).read_bytes()
    keys.renew_server(folder, [])
    new = keys.check_server(folder, "127.0.0.1")
    assert new.serial_number != old.serial_number
    assert sorted(keys.names_of(new)) == sorted(keys.names_of(old))
    assert (folder / keys.SERVER_KEY).read_bytes() == key
    keys.renew_server(folder, ["10.77.0.9"])
    assert "10.77.0.9" in keys.names_of(keys.check_server(folder, "10.77.0.9"))


def test_a_server_of_a_known_authority_needs_no_new_one(folder):
    before = (folder / keys.CA).read_bytes()
    for file in (keys.SERVER, keys.SERVER_KEY):
        (folder / file).unlink()
    keys.write_server(folder, ["server.example.org"])
    keys.check_server(folder, "127.0.0.1")
    assert (folder / keys.CA).read_bytes() == before


def test_no_certificate_outlives_its_authority():
    authority = keys.make_authority(keys.Period.of(10))
    assert keys.make_server(authority, ["x"], keys.Period.of(800)).certificate.not_valid_after_utc == (
        authority.certificate.not_valid_after_utc
    )


@pytest.mark.parametrize(
    ("period", "says"), [(PAST, "server.pem: expired on"), (FUTURE, "server.pem: not valid before")]
)
def test_a_certificate_out_of_its_time_is_refused(folder, period, says):
    server = keys.make_server(keys.read_authority(folder), ["x"], period, keys.read_private_pem(folder / "server.key"))
    (folder / keys.SERVER).write_bytes(server.certificate.public_bytes(Encoding.PEM))
    with pytest.raises(InputError, match=says):
        keys.check_server(folder, "127.0.0.1")


def test_an_authority_out_of_its_time_is_refused(tmp_path):
    (tmp_path / keys.CA).write_bytes(keys.make_authority(PAST).certificate.public_bytes(Encoding.PEM))
    with pytest.raises(InputError, match=r"ca\.crt: expired on"):
        keys.check_authority(tmp_path / keys.CA)


def mix(folder: Path, others: Path, file: str) -> None:
    (folder / file).write_bytes((others / file).read_bytes())


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda folder, _: (folder / keys.SERVER).unlink(), "server.pem: cannot be read: No such file"),
        (lambda folder, _: (folder / keys.CA).write_text("hello"), "ca.crt: expected a certificate in PEM format"),
        (lambda folder, _: (folder / keys.SERVER_KEY).write_text("x"), "server.key: expected an unencrypted private"),
        (
            lambda folder, others: mix(folder, others, keys.SERVER_KEY),
            "server.pem: expected the certificate of the key",
        ),
        (lambda folder, others: mix(folder, others, keys.CA), "server.pem: expected a certificate by the authority"),
        (
            lambda folder, _: (folder / keys.CA).write_bytes((folder / keys.SERVER).read_bytes()),
            "ca.crt: expected the certificate of an authority",
        ),
    ],
)
def test_files_that_do_not_go_together_are_named(folder, tmp_path, harm, says):
    keys.write_server(tmp_path / "others", ["x"])
    harm(folder, tmp_path / "others")
    with pytest.raises(InputError, match=says):
        keys.check_server(folder, "127.0.0.1")


def test_an_address_that_the_certificate_lacks_is_refused_with_the_way_out(folder):
    with pytest.raises(InputError, match=r"for 10\.77\.0\.2, got one for .*keys --renew --name 10\.77\.0\.2"):
        keys.check_server(folder, "10.77.0.2")


@pytest.mark.parametrize("name", ["", "a b", "-a.org", "a..org", "*.org", "ä.org", "10.0.0.256", "a" * 70 + ".org"])
def test_what_is_no_name_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="expected a host name or an IP address"):
        keys.write_server(tmp_path / "keys", [name])
    assert not (tmp_path / "keys").exists()


def test_a_clients_key_is_what_flower_takes(tmp_path):
    private, public = keys.write_client(tmp_path, "hospital-a")
    loaded = load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert loaded.curve.name == "secp384r1"
    assert loaded.public_key() == load_ssh_public_key(public.read_bytes())
    assert public.read_text().endswith(" hospital-a\n")
    assert keys.read_client_key(private) == loaded or keys.read_public(public) in public.read_text()


def test_other_keys_are_no_clients_keys(tmp_path):
    other = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "a.pub").write_bytes(other.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    (tmp_path / "a.key").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    private, _ = keys.write_client(tmp_path, "b")
    (tmp_path / "c.pub").write_bytes(private.read_bytes())
    for file in ("a.pub", "c.pub"):
        with pytest.raises(InputError, match=rf"{file}: expected a public ECDSA key"):
            keys.read_public(tmp_path / file)
    with pytest.raises(InputError, match=r"a\.key: expected an ECDSA key"):
        keys.read_client_key(tmp_path / "a.key")


def test_a_trial_has_all_that_three_clients_and_a_server_need(tmp_path, capsys):
    out = tmp_path / "keys"
    assert commands.run({"keys": command}, ["keys", "--out", str(out), "--name", "10.77.0.1", "--clients", "3"]) == 0
    assert capsys.readouterr().out.count("wrote ") == 4 + 3 * 3
    keys.check_server(out, "127.0.0.1")
    for k in range(3):
        own = out / f"client-{k}"
        keys.check_authority(own / keys.CA)
        key = keys.read_client_key(own / f"client-{k}.key").public_key()
        public = load_ssh_public_key((out / "clients" / f"client-{k}.pub").read_bytes())
        assert key == public


def test_an_institution_makes_its_own_key_and_learns_what_to_send(tmp_path, capsys):
    assert commands.run({"keys": command}, ["keys", "--out", str(tmp_path), "--client", "hospital-a"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'hospital-a.key'}, which stays here" in shown
    assert f"{tmp_path / 'hospital-a.pub'}, to be sent" in shown
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hospital-a.key", "hospital-a.pub"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected --name HOST for a server, or --client NAME for a client"),
        (["--client", "a", "--name", "x"], "makes a client's own key alone"),
        (["--client", "../a"], "expected a name of letters"),
        (["--client", "server"], "expected a name of letters"),
        (["--renew"], "ca.crt: cannot be read"),
        (["--name", "a b"], "expected a host name"),
        (["--name", "a", "--days", "0"], "0 is not in the range"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, capsys, arguments, says):
    out = tmp_path / "keys"
    assert commands.run({"keys": command}, ["keys", "--out", str(out), *arguments]) == commands.BAD_INPUT
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()
