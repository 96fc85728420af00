"""Where published files are found, and what a user is told when they are not."""

from __future__ import annotations

import hashlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fedxmr.data import files
from fedxmr.data.files import RemoteFile, github, locate, read_mat
from fedxmr.errors import InputError

CONTENT = b"real bytes " * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:2000] if self.path == "/cut-off" else CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache, no FEDXMR_DATA, and no proxy in the way of the loopback server."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FEDXMR_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "fedxmr"


@pytest.fixture
def remote(server: str) -> RemoteFile:
    return RemoteFile("set/file.bin", f"{server}/file.bin", SHA256)


def place(folder: Path, content: bytes = CONTENT) -> Path:
    path = folder / "set" / "file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def message(file: RemoteFile, data_dir: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        locate(file, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_downloaded_into_the_cache_once(remote: RemoteFile, cache: Path):
    path = locate(remote)
    assert path == cache / "set" / "file.bin"
    assert path.read_bytes() == CONTENT
    # nothing answers at this address: the second time no download is tried
    assert locate(replace(remote, url="http://127.0.0.1:9/file.bin")) == path


def test_a_damaged_file_in_the_cache_is_downloaded_again(remote: RemoteFile, cache: Path):
    place(cache, b"damaged")
    assert locate(remote).read_bytes() == CONTENT


def test_a_download_with_a_wrong_checksum_is_not_kept(remote: RemoteFile, cache: Path):
    said = message(replace(remote, sha256="0" * 64))
    assert "0" * 64 in said
    assert SHA256 in said
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_without_network_the_error_names_the_url_and_both_ways_out(cache: Path):
    with socket.socket() as reserved:  # bound but not listening: connections to it are refused
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}/file.bin"
        said = message(RemoteFile("set/file.bin", url, SHA256))
    assert said.startswith("set/file.bin: ")
    assert f"download {url} by hand to {cache / 'set' / 'file.bin'}" in said
    assert "point FEDXMR_DATA or --data-dir at a folder that has set/file.bin" in said


@pytest.mark.parametrize(("address", "reason"), [("missing", "404"), ("cut-off", "2000 bytes read")])
def test_a_failed_answer_is_reported_and_leaves_nothing(
    address: str, reason: str, remote: RemoteFile, server: str, cache: Path
):
    assert reason in message(replace(remote, url=f"{server}/{address}"))
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_download_has_a_deadline(remote: RemoteFile, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "DEADLINE", 0.0)
    assert "not finished after 0 s" in message(remote)


def test_a_file_in_a_users_folder_is_used_in_place(
    remote: RemoteFile, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    in_data_dir, in_environment = place(tmp_path / "given"), place(tmp_path / "environment")
    monkeypatch.setenv("FEDXMR_DATA", str(tmp_path / "environment"))
    assert locate(remote) == in_environment
    assert locate(remote, tmp_path / "given") == in_data_dir
    assert not cache.exists()


def test_the_next_folder_is_asked_for_what_the_first_lacks(
    remote: RemoteFile, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "given").mkdir()
    monkeypatch.setenv("FEDXMR_DATA", str(tmp_path / "environment"))
    elsewhere = place(tmp_path / "environment")
    assert locate(remote, tmp_path / "given") == elsewhere
    assert not list((tmp_path / "given").iterdir())


def test_a_wrong_checksum_in_a_users_folder_is_an_error_and_no_download(
    remote: RemoteFile, cache: Path, tmp_path: Path
):
    path = place(tmp_path / "given", b"altered")
    found = hashlib.sha256(b"altered").hexdigest()
    assert message(remote, tmp_path / "given") == f"{path}: expected sha256 {SHA256}, got {found}"
    assert path.read_bytes() == b"altered"
    assert not cache.exists()


def test_a_users_folder_that_is_not_there_is_an_error(
    remote: RemoteFile, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert message(remote, tmp_path / "typo") == f"--data-dir: expected a folder, got '{tmp_path / 'typo'}'"
    monkeypatch.setenv("FEDXMR_DATA", str(tmp_path / "typo"))
    assert message(remote) == f"FEDXMR_DATA: expected a folder, got '{tmp_path / 'typo'}'"


def test_addresses_of_repository_files_escape_spaces():
    assert github("a/b", "c0ffee", "x y/z.mat") == "https://raw.githubusercontent.com/a/b/c0ffee/x%20y/z.mat"


@pytest.mark.parametrize("damage", ["empty", "header only", "cut off", "overwritten", "text"])
def test_a_damaged_mat_file_gets_one_line(damage: str, tmp_path: Path):
    path = tmp_path / "x.mat"
    savemat(path, {"x": np.random.default_rng(0).normal(size=(50, 50))}, do_compression=True)
    assert read_mat(path, checksum(path))["x"].shape == (50, 50)
    content = path.read_bytes()
    path.write_bytes({
        "empty": b"",
        "header only": content[:100],
        "cut off": content[:2000],
        "overwritten": content[:200] + bytes(1000) + content[1200:],
        "text": b"<html>not found</html>" * 20,
    }[damage])  # fmt: skip
    with pytest.raises(InputError, match=r"x\.mat: expected a MATLAB file") as caught:
        read_mat(path, checksum(path))
    assert "\n" not in str(caught.value)


def test_importing_the_data_sets_imports_no_heavy_library():
    heavy = "{'scipy', 'sklearn', 'pooch', 'requests'}"
    code = f"import sys, fedxmr.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
