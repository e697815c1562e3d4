"""Runs that several files only read: trained once."""

import numpy as np
import pytest

COLOURS = {"blue": (40, 60, 200), "red": (200, 50, 40)}


def painted(folder, classes=COLOURS, number=10):
    """A folder of class/N.png, each of one colour with noise."""
    pillow = pytest.importorskip("PIL.Image", reason="pillow is not installed: no image files")
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(number):
            noise = generator.integers(-30, 30, (12, 12, 3))
            pixels = np.clip(np.array(COLOURS.get(name, (9, 9, 9))) + noise, 0, 255)
            pillow.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run in bf16 on 20 pictures, red and blue."""
    pytest.importorskip("tyro", reason="tyro is not installed: no command line")
    from fastmp import cli

    folder = tmp_path_factory.mktemp("trained")
    painted(folder / "colours")
    flags = ["--data", str(folder / "colours"), "--out", str(folder / "run"), "--dtype", "bf16"]
    flags += ["--model", "mlp", "--epochs", "3", "--batch-size", "4", "--workers", "0"]
    assert cli.main(["train", *flags]) == 0
    return folder
