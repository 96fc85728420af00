"""What a whole run never does: unpickle anything, or send anything beyond this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.federations import SMALL, federate, same_bytes
from tests.guards import BITTEN, ROOT, guarded

BASE = [*SMALL, "federation.rounds=5", "federation.checkpoint_every=2", "runtime.engine=local"]

WHOLE = """
import sys
from pathlib import Path

import torch

from fedxmr import commands
from fedxmr.rounds import Client
from fedxmr.simulate import simulate

out, base, data = sys.argv[1], sys.argv[2].split("|"), sys.argv[3]
train, left = Client._train, iter(range(10, -1, -1))

def interrupted(self, task):
    if next(left, 1) == 0:
        raise KeyboardInterrupt
    return train(self, task)

Client._train = interrupted
assert commands.run(simulate, [*base, "--out", out]) == commands.INTERRUPTED
assert commands.run(simulate, ["--resume", out, "--examples", "2"]) == commands.OK
assert len(list(Path(out).glob("pictures/*"))) == 4

import fedxmr

model = fedxmr.load(out, client=1)
assert model.encode("image", torch.zeros(2, 6)).shape[0] == 2
budget = ["runtime.memory_budget=1B", "federation.rounds=1", "--no-pictures", "--out", f"{out}-files"]
assert commands.run(simulate, [*base, *budget]) == commands.OK
assert commands.run(simulate, ["--dataset", f"{data}/", "--rounds", "1", "--no-pictures", "--out", f"{out}-own"]) == 0
print("never")
"""


def arguments(code: str, *given: str) -> str:
    """Code that finds `given` on its command line."""
    return f"import sys\nsys.argv[1:] = {list(given)!r}\n{code}"


def test_a_whole_run_unpickles_nothing_and_sends_nothing(tmp_path):
    """With checkpoints, an interruption, a resume, report, pictures, examples, states in files, own data and `load`."""
    data = tmp_path / "mine"
    (data / "features").mkdir(parents=True)
    for modality in ("image", "text"):
        np.save(data / "features" / f"{modality}.npy", np.random.default_rng(0).normal(size=(60, 4)))
    np.save(data / "labels.npy", np.arange(60) % 3)
    np.savez(data / "split.npz", train=np.arange(40), validation=np.arange(40, 50), test=np.arange(50, 60))
    ran = guarded(arguments(WHOLE, str(tmp_path / "run"), "|".join(BASE), str(data)))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("never\n")
    federate(tmp_path / "whole", base=tuple(BASE))
    assert same_bytes(tmp_path / "whole", tmp_path / "run")


CODEC = """
import numpy as np
import torch
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto

from fedxmr import wire
from fedxmr.engines.carrier import identify
from fedxmr.messages import Registration, Task, Update
from fedxmr.scaling import Moments, Scaler
from fedxmr.types import DataSpec

identify(1)

def carried(content):
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))

w = {"w": torch.randn(3, 2)}
scores = {"image->text": 0.5, "text->image": 0.5, "average": 0.5}
moments = {"image": Moments(4, torch.zeros(2).double(), torch.ones(2).double())}
spec = DataSpec({"image": 2, "text": 3}, 2)
counts = torch.tensor([2, 2])
registration = Registration(0, 4, counts, spec, {"image": 4, "text": 4}, moments, {"torch": "2"}, "aa")
update = Update(1, 0, 4, counts, 0.5, w, scores, scores)
task = Task(1, 0, 0, w, scaler=Scaler.of(moments))
wire.unpack_registration(carried(wire.pack_registration(registration)))
assert wire.unpack_task(carried(wire.pack_task(task))).shared["w"].equal(w["w"])
assert wire.unpack_update(carried(wire.pack_update(update))).shared["w"].equal(w["w"])

def nested(content):
    found = {content.object_id: content.deflate()}
    for child in (content.children or {}).values():
        found |= nested(child)
    return found

content = wire.pack_update(update)
again = inflate_object_from_contents(content.object_id, nested(content))
assert wire.unpack_update(again).shared["w"].equal(w["w"])
"""

STRANGER = """
import io, pickle
stream = io.BytesIO()
np.save(stream, np.array([print], dtype=object), allow_pickle=True)
pickled = pickle.dumps(print)
for kind, data in (("numpy.ndarray", stream.getvalue()), ("fedxmr.raw", pickled), ("pickle", pickled)):
    record = ArrayRecord()
    record["w"] = Array("float32", (3, 2), kind, data)
    content = wire.pack_update(update)
    content["arrays"] = record
    try:
        wire.unpack_update(carried(content))
    except wire.WireError:
        continue
    raise SystemExit(f"{kind} was taken")
"""


def test_flowers_codec_and_ours_unpickle_nothing_even_of_a_strangers_message():
    ran = guarded(CODEC + STRANGER)
    assert ran.returncode == 0, ran.stderr


UNPICKLES = [
    "import pickle; pickle.loads(pickle.dumps([1]))",
    "import io, pickle; pickle.load(io.BytesIO(pickle.dumps([1])))",
    "import io, pickle; pickle.Unpickler(io.BytesIO(pickle.dumps([1]))).load()",
    "import _pickle; _pickle.loads(_pickle.dumps(print))",  # behind the guard's back: the audit event tells
    "import io, joblib; f = io.BytesIO(); joblib.dump([1], f); f.seek(0); joblib.load(f)",
    "import io, numpy as np; f = io.BytesIO(); np.save(f, np.array([None])); f.seek(0); np.load(f, allow_pickle=True)",
    "import io, torch; f = io.BytesIO(); torch.save([1], f); f.seek(0); torch.load(f, weights_only=False)",
    "from flwr.app import Array; import cloudpickle; cloudpickle.loads(cloudpickle.dumps(lambda: 1))",
]
SENDS = [
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
    "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect(('2001:db8::1', 9))",
    "import socket; socket.create_connection(('192.0.2.1', 9), timeout=1)",
    "import socket; socket.gethostbyname('fedxmr.invalid')",
    "import urllib.request; urllib.request.urlopen('http://fedxmr.invalid/')",
]


@pytest.mark.parametrize("code", [*UNPICKLES, *SENDS])
@pytest.mark.long
def test_the_guards_bite(code):
    ran = guarded(f"try:\n    exec({code!r})\nexcept BaseException: pass")
    assert ran.returncode == BITTEN, ran.stderr
    assert ran.stderr.startswith("guard: ")


IN_A_RUN = """
import sys
from fedxmr import commands
from fedxmr.rounds import Client
from fedxmr.simulate import simulate
def harmful(*_):
    {harm}
Client._train = harmful
commands.main(simulate)
"""


@pytest.mark.parametrize(
    "harm",
    [pytest.param(UNPICKLES[0], id="unpickles"), pytest.param(SENDS[0], id="sends", marks=pytest.mark.long)],
)
def test_a_guard_ends_a_run_in_which_a_client_does_it(tmp_path, harm):
    """Though a client's exception is no more than a failed client."""
    ran = guarded(arguments(IN_A_RUN.format(harm=harm), *BASE, "--out", str(tmp_path / "run")))
    assert ran.returncode == BITTEN, ran.stderr
    assert "harmful" in ran.stderr


def test_loopback_is_none_of_the_guards_business():
    ran = guarded("""
import socket
listening = socket.create_server(("127.0.0.1", 0))
socket.create_connection(("localhost", listening.getsockname()[1])).close()
one, other = socket.socketpair(socket.AF_UNIX)
one.sendall(b"x")
""")
    assert ran.returncode == 0, ran.stderr


NETWORK = """
import fcntl, os, socket, struct, subprocess, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running
metered = sys.argv[1] == "metered"
if metered:  # all that is not for this machine goes to a device of ours
    try:
        for setting in ("all", "default"):
            with open(f"/proc/sys/net/ipv6/conf/{setting}/disable_ipv6", "w") as file:
                file.write("1")
        outside = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(outside, 0x400454CA, struct.pack("16sH22x", b"outside", 0x1001))  # TUNSETIFF: packets, nothing else
        for command in ("addr add 198.51.100.2/24 dev outside", "link set outside up", "route add default dev outside"):
            subprocess.run(["ip", *command.split()], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        sys.exit(78)
code = subprocess.call(sys.argv[2:])
packets = []
try:
    while metered:
        packets.append(os.read(outside, 65536))
except BlockingIOError:
    print("packets:", len(packets), *(socket.inet_ntoa(packet[16:20]) for packet in packets))
sys.exit(code)
"""


def in_network(kind: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command where there is no network but the loopback, or ("metered") one whose packets are counted."""
    namespace = ["unshare", "-n" if os.getuid() == 0 else "-rn"]
    try:
        tried = subprocess.run([*namespace, "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no network of its own: {error}")
    if tried.returncode:
        pytest.skip(f"no network of its own: {tried.stderr.strip()}")
    ran = subprocess.run(
        [*namespace, sys.executable, "-c", NETWORK, kind, *command],
        cwd=ROOT, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    if ran.returncode == 78:
        pytest.skip(f"no metered network: {ran.stderr.strip()}")
    return ran


def on_ray(out: Path) -> list[str]:
    own = [*BASE[:-1], "runtime.engine=ray", "runtime.device=cpu", "runtime.workers=2", "--no-pictures"]
    return [sys.executable, "-m", "fedxmr.simulate", *own, "--out", str(out)]


@pytest.mark.parametrize("kind", ["metered", pytest.param("loopback", marks=pytest.mark.long)])
def test_a_whole_run_on_ray_sends_nothing_beyond_this_machine(tmp_path, kind):
    """Ray's processes are not Python, so the network itself tells; and without one the run ends as it always does."""
    ran = in_network(kind, *on_ray(tmp_path / "run"))
    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["engine"] == "ray"
    if kind == "metered":
        assert ran.stdout.splitlines()[-1] == "packets: 0"
    federate(tmp_path / "whole", base=tuple(BASE))
    assert same_bytes(tmp_path / "whole", tmp_path / "run")


def test_the_meter_counts_what_is_sent():
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"
    assert in_network("metered", sys.executable, "-c", code).stdout == "packets: 1 192.0.2.1\n"
