"""What time and machines do to a run: memory, repetition, workers, a home that is read-only."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastmp
from fastmp.training import log

SOAK = bool(os.environ.get("FASTMP_SOAK"))

# ---- memory ----

WINDOW = 4_000 if SOAK else 200  # steps; five of them
LOOP = """
import gc, json, os, sys, torch, fastmp
from torch import nn
torch.manual_seed(0)
dtype = getattr(torch, sys.argv[1])
layers = nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
model = fastmp.convert(nn.Sequential(*layers), dtype)
optimizer = fastmp.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
scaler = fastmp.amp.GradScaler("cpu", enabled=dtype == torch.float16, growth_interval=50)
schedule = fastmp.schedule.OneCycle(0.01, 100_000).bind(optimizer)
criterion = fastmp.nn.CrossEntropyLoss(label_smoothing=0.1)
mixup = fastmp.data.Mixup(alpha=0.2, cutmix_alpha=1.0, dtype=dtype)
images, labels = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), torch.randint(10, (32,))

def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = mixup(images, labels)
        scaler.scale(criterion(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()

def used():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects())

train(300)
seen = [used()]
for _ in range(5):
    train(int(sys.argv[2]))
    seen.append(used())
print(json.dumps([[b - a for a, b in zip(column, column[1:])] for column in zip(*seen)]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memory_stays_flat(dtype):
    """Mixup, linear layers, loss, scaler, schedule, step: bytes and objects after each window.

    A leak shows in every window; a buffer that oneDNN makes late, 1.8 MB in bf16, in one.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOOP, dtype, str(WINDOW)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, objects = json.loads(done.stdout.splitlines()[-1])
    assert statistics.median(grown) <= 100 * WINDOW  # bytes: less than one object in a step
    assert statistics.median(objects) <= 2


# ---- the same bits ----


def at_once(*lines, home=None):
    """What these command lines of fastmp print, run side by side."""
    environment = {**os.environ, **({"HOME": home} if home else {})}
    if home:
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "FASTMP_CACHE", "MPLCONFIGDIR"):
            environment.pop(name, None)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "fastmp", *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for words in lines
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(lines), printed
    return printed


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_three_runs_end_with_the_same_bits(tmp_path, dtype):
    """In each other's way, with mixup, cutmix, an average of the weights: every tensor and loss."""
    flags = ["--epochs", "1", "--mixup", "0.2", "--cutmix", "1.0", "--ema", "0.99"]
    runs = [tmp_path / str(n) for n in range(3)]
    at_once(*(["train", "--dtype", dtype, *flags, "--out", str(out)] for out in runs))
    ends = []
    for out in runs:
        newest = max((out / "checkpoints").iterdir())
        tensors = {p.name: p.read_bytes() for p in newest.rglob("*.safetensors")}
        rows = log.read(out / log.FILE)
        losses = [{k: v for k, v in row.items() if "loss" in k or "acc" in k} for row in rows]
        assert tensors
        assert any(losses)
        ends.append((tensors, losses))
    assert ends[0] == ends[1] == ends[2]


# ---- workers ----


class Mixed(Dataset):
    """Calls the kernels where the worker runs: mix, linear layer and loss of one sample."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        images = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16).add(index).to(torch.uint8)
        mixed = fastmp.functional.mix(images, 0.3, torch.tensor([1, 0]), dtype=torch.float16)
        weight = torch.ones(5, 768, dtype=torch.float16) / 768
        logits = fastmp.functional.linear(mixed.flatten(1), weight)
        return logits, fastmp.functional.cross_entropy(logits, torch.tensor([0, index % 5]))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_kernels_in_workers(method):
    """After this process has run them on all its threads, which a fork does not inherit."""
    x = torch.randn(512, 512, dtype=torch.float16)
    fastmp.functional.linear(x, x)
    expected = list(DataLoader(Mixed(), batch_size=4))
    found = list(
        DataLoader(
            Mixed(), batch_size=4, num_workers=2, multiprocessing_context=method, timeout=120
        )
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- a home that cannot be written to ----


@pytest.mark.usefixtures("commands")
def test_without_a_home_to_write_to(tmp_path):
    """/proc takes no files, not even from root."""
    out = tmp_path / "run"
    train, _, _ = at_once(
        ["train", "--epochs", "1", "--out", str(out)], ["verify"], ["doctor"], home="/proc"
    )
    assert "accuracy" in train
    assert (out / "curves.png").stat().st_size > 0


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    "words",
    [("train", "--out", "/proc/run"), ("lr-find", "--picture", "/proc/a.png"),
     ("bench", "--out", "/proc/bench")],
    ids=lambda w: w[0],
)  # fmt: skip
def test_a_folder_for_results_that_takes_none_is_refused_before_the_work(words, capsys):
    from fastmp import cli

    start = time.monotonic()
    assert cli.main(words) == 2
    assert "expected a folder that can be written to, got /proc" in capsys.readouterr().err
    assert time.monotonic() - start < 30  # bench takes 20 minutes, lr-find 100 steps
