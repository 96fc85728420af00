"""A state file comes back bit for bit or not at all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from fedxmr import state
from fedxmr.errors import InputError
from fedxmr.state import finite

STATE = {"a.weight": torch.randn(3, 2), "b": torch.tensor(1.5, dtype=torch.float64), "n": torch.arange(4)}


def test_round_trip(tmp_path):
    state.save(tmp_path / "deep" / "x.safetensors", STATE, {"round": 3})
    got, about = state.load(tmp_path / "deep" / "x.safetensors")
    assert about == {"round": 3}
    assert got.keys() == STATE.keys()
    assert all(torch.equal(got[name], STATE[name]) for name in STATE)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    state.save(path, STATE, {"round": 1})

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        state.save(path, STATE, {"round": 2})
    assert state.load(path)[1] == {"round": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_no_changed_byte_goes_unnoticed(tmp_path):
    path = tmp_path / "x.safetensors"
    state.save(path, STATE, {"round": 3, "text": 'a "sha256":"' + "0" * 64 + '" of its own'})
    content = path.read_bytes()
    for position in range(len(content)):
        for flip in (0x01, 0x20, 0x29):  # 0x20: letters' case; 0x29: a space becomes a tab
            changed = bytearray(content)
            changed[position] ^= flip
            path.write_bytes(changed)
            with pytest.raises(InputError, match="not a state of fedxmr's, or damaged"):
                state.load(path)
    for changed in (content + b"\0", content[:-1], b""):
        path.write_bytes(changed)
        with pytest.raises(InputError, match="not a state of fedxmr's, or damaged"):
            state.load(path)
    path.write_bytes(content)
    assert state.load(path)[1]["round"] == 3


@pytest.mark.parametrize("keep", [0, 7, 100])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    state.save(path, STATE, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError) as caught:
        state.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_digest_sees_names_shapes_types_and_bits_but_not_order():
    same = dict(reversed(STATE.items()))
    assert state.sha256(same) == state.sha256(STATE)
    for other in (
        {**STATE, "b": torch.tensor(1.5)},
        {**STATE, "a.weight": STATE["a.weight"].reshape(2, 3)},
        {"A.weight": STATE["a.weight"], "b": STATE["b"], "n": STATE["n"]},
        {**STATE, "b": torch.tensor(-1.5, dtype=torch.float64)},
    ):
        assert state.sha256(other) != state.sha256(STATE)


def test_a_disk_that_is_full_is_an_error_of_the_disk(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        state.save(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {})
    assert caught.value.filename == str(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@settings(deadline=None)
@given(
    st.lists(st.floats(width=32), max_size=40),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_finite_is_what_isfinite_says_of_all(numbers, dtype):
    tensor = torch.tensor(numbers, dtype=dtype)
    assert finite(tensor) == bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 40_000, 99_999])
def test_finite_finds_one_bad_number_among_many(bad, at):
    tensor = torch.randn(100_000)
    tensor[at] = bad
    assert not finite(tensor)
