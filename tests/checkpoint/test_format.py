"""Checkpoints: bit for bit, atomic, and a clear error for every file that is damaged."""

from __future__ import annotations

import enum
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmp.optim
from fastmp import amp, checkpoint
from fastmp.checkpoint import CheckpointError, format

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


def same(a, b) -> bool:
    """Equal in type and in every bit; NaNs with the same bits are equal."""
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        return (raw[..., 0] % 2).bool()
    tensor = raw.view(dtype)[..., 0]  # every bit pattern, NaNs and denormals too
    return tensor.t() if tensor.dim() == 2 and draw(st.booleans()) else tensor


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just("$tensor"),
    tensors(),
)
keys = st.one_of(st.text(max_size=5), st.integers(-3, 3), st.just("$tuple"), st.just("a.b"))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(state=st.dictionaries(keys, trees, max_size=4))
def test_round_trip_keeps_every_bit(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save(path, state)
    assert same(checkpoint.load(path), state)


def test_paths_that_spell_the_same_do_not_collide(tmp_path):
    state = {
        "a": {"b": torch.zeros(1)},
        "a.b": torch.ones(1),
        1: torch.zeros(2),
        "1": torch.ones(2),
    }
    checkpoint.save(tmp_path / "c", state)
    assert same(checkpoint.load(tmp_path / "c"), state)


class Mode(enum.IntEnum):
    FAST = 3


def test_numbers_of_numpy_come_back_as_pythons(tmp_path):
    state = {
        "float64": np.float64(0.1), "float32": np.float32(0.1), "int": np.int64(-7),
        "bool": np.bool_(True), "str": np.str_("a"), "0-d": np.array(2.5), "enum": Mode.FAST,
        np.int64(4): [np.float16("inf"), (np.uint8(255),)],
    }  # fmt: skip
    checkpoint.save(tmp_path, state)
    loaded = checkpoint.load(tmp_path)
    assert loaded == {
        "float64": 0.1, "float32": float(np.float32(0.1)), "int": -7, "bool": True, "str": "a",
        "0-d": 2.5, "enum": 3, 4: [math.inf, (255,)],
    }  # fmt: skip
    assert [type(value) for value in loaded.values()][:7] == [
        float,
        float,
        int,
        bool,
        str,
        float,
        int,
    ]
    for refused in (np.longdouble(0.1), np.complex64(1j), np.zeros(3)):
        with pytest.raises(CheckpointError, match="expected tensors, numbers"):
            checkpoint.save(tmp_path, {"x": refused})


def test_views_of_one_arena_are_saved_as_what_they_show(tmp_path):
    arena = torch.arange(12.0)
    state = {"a": arena[:4], "b": arena[2:8].view(2, 3), "whole": arena}
    checkpoint.save(tmp_path / "c", state)
    assert same(checkpoint.load(tmp_path / "c"), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path, kind, dtype):
    def setup():
        torch.manual_seed(0)
        model = amp.convert(
            torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)), dtype
        )
        optimizer = getattr(fastmp.optim, kind)(model.parameters(), lr=0.01, max_grad_norm=1.0)
        return model, optimizer, amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def train(model, optimizer, scaler, steps):
        for step in steps:
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
            scaler.scale(model(x).float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    def state(model, optimizer, scaler):
        parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    straight = setup()
    train(*straight, range(6))
    first = setup()
    train(*first, range(3))
    checkpoint.save(tmp_path / "c", state(*first))
    second = setup()
    loaded = checkpoint.load(tmp_path / "c")
    assert same(loaded, checkpoint_view(state(*first)))
    for part, name in zip(second, ("model", "optimizer", "scaler"), strict=True):
        part.load_state_dict(loaded[name])
    train(*second, range(3, 6))
    assert same(checkpoint_view(state(*second)), checkpoint_view(state(*straight)))


def checkpoint_view(state):
    """Plain dicts, as ``load`` returns them (a module's state_dict is an OrderedDict)."""
    return {name: dict(part) for name, part in state.items()}


def test_saving_again_replaces_and_leaves_no_litter(tmp_path):
    for value in (1.0, 2.0, 2.0):
        checkpoint.save(tmp_path / "c", {"w": torch.tensor(value)})
        assert checkpoint.load(tmp_path / "c")["w"] == value
        assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".json", ".safetensors"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL exists on POSIX systems only")
def test_a_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    program = (
        "import sys, torch; from fastmp import checkpoint\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    checkpoint.save(sys.argv[1], {'n': n, 'w': torch.full((200_000,), float(n))})\n"
        "    print(n, flush=True)\n"
    )
    path = tmp_path / "c"
    # one interpreter, killed a random-looking while after its first save, again and again
    for round_ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        done = int(process.stdout.readline())
        time.sleep(0.0137 * round_)
        process.send_signal(signal.SIGKILL)
        done = max([done, *map(int, process.stdout.read().split())])
        process.stdout.close()
        process.wait()
        state = checkpoint.load(path)
        assert done <= state["n"] <= done + 1
        assert (state["w"] == float(state["n"])).all()


@pytest.mark.parametrize("large", [torch.zeros(1000), list(range(1000))], ids=["tensors", "json"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, large):
    resource = pytest.importorskip("resource", reason="files are limited on POSIX systems only")
    path = tmp_path / "c"
    checkpoint.save(path, {"n": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            checkpoint.save(path, {"n": 2, "large": large})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(path) == {"n": 1}
    checkpoint.save(path, {"n": 3})
    assert checkpoint.load(path) == {"n": 3}
    assert len(list(path.iterdir())) == 2  # what the failed save left is gone


def saved(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, {"w": torch.arange(100.0), "lr": 0.5})
    return path, path / "manifest.json", next(path.glob("*.safetensors"))


@pytest.mark.parametrize("part", ["manifest", "tensors"])
@pytest.mark.parametrize("at", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_file_is_named(tmp_path, part, at, damage):
    path, manifest, tensor_file = saved(tmp_path)
    file = manifest if part == "manifest" else tensor_file
    contents = bytearray(file.read_bytes())
    if damage == "flip":
        position = int(at * len(contents))
        while chr(contents[position]).isspace():  # white space carries nothing in JSON
            position += 1
        contents[position] ^= 1
    else:
        del contents[int(at * len(contents)) :]
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"take an older|load it with") as error:
        checkpoint.load(path)
    assert file.name in str(error.value)
    assert "expected" in str(error.value) or "format version" in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.manifest.json cannot be used"):
        checkpoint.load(tmp_path / "nowhere")
    path, _, tensor_file = saved(tmp_path)
    tensor_file.unlink()
    with pytest.raises(CheckpointError, match=tensor_file.name):
        checkpoint.load(path)


def test_another_version_and_another_file_are_refused(tmp_path):
    path, manifest, _ = saved(tmp_path)
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(CheckpointError, match="has format version 99, this fastmp reads 1"):
        checkpoint.load(path)
    manifest.write_text("[]")
    with pytest.raises(CheckpointError, match="expected format 'fastmp-checkpoint'"):
        checkpoint.load(path)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path):
    path, manifest, tensor_file = saved(tmp_path)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(tensor_file.read_bytes())
    content = json.loads(manifest.read_text())
    content["content"]["tensors"]["file"] = "../outside.safetensors"
    content["sha256"] = format._content_sum(content["content"])
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the name of a tensor file beside it"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1, object()]}, r"state\.a\.1: expected tensors, numbers.* got object"),
        ({"a": {(1, 2): 3}}, r"state\.a: keys must be str or int, got \(1, 2\)"),
        ({"a": torch.eye(2).to_sparse()}, r"state\.a: only dense tensors"),
    ],
)
def test_what_cannot_be_saved_is_named_and_the_old_checkpoint_stays(tmp_path, state, message):
    path, _, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(path, state)
    assert checkpoint.load(path)["lr"] == 0.5


def test_infinities_survive(tmp_path):
    checkpoint.save(tmp_path / "c", {"x": (math.inf, -math.inf, math.nan)})
    x = checkpoint.load(tmp_path / "c")["x"]
    assert x[:2] == (math.inf, -math.inf)
    assert math.isnan(x[2])
