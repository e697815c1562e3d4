"""fastmp lr-find."""

import pytest

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

from fastmp import cli


@pytest.mark.parametrize("flags", [("--steps", "3"), ("--low", "1e-300", "--steps", "9")])
def test_no_suggestion_is_an_error_and_no_nan(tmp_path, capsys, flags):
    picture = tmp_path / "curve.png"
    words = ["lr-find", "--model", "mlp", "--dtype", "fp32", *flags, "--picture", str(picture)]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert "nan" not in out
    assert err.startswith("fastmp lr-find: error: no suggestion: the loss did not fall from low=")
    assert picture.exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
def test_lr_find(tmp_path, capsys, optimizer):
    picture = tmp_path / "curve.png"
    flags = ["--model", "mlp", "--dtype", "fp32", "--steps", "60", "--picture", str(picture)]
    flags += ["--optimizer", optimizer]
    assert cli.main(["lr-find", *flags]) == 0
    shown = capsys.readouterr().out
    suggestion = float(shown.split("--lr ")[1].split()[0])
    assert 1e-5 < suggestion < 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
