"""fastmp lr-find."""

import pytest

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import cli


def test_lr_find(tmp_path, capsys):
    picture = tmp_path / "curve.png"
    flags = ["--model", "mlp", "--dtype", "fp32", "--steps", "60", "--picture", str(picture)]
    assert cli.main(["lr-find", *flags]) == 0
    shown = capsys.readouterr().out
    suggestion = float(shown.split("--lr ")[1].split()[0])
    assert 1e-5 < suggestion < 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
