"""From a trained run to its predictions, its evaluation and its exports."""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: no command line to test")

import fastmp
from fastmp import cli
from fastmp.data import DataError
from fastmp.models import ModelError, export
from fastmp.models.run import RunError
from fastmp.training import log
from tests.cli.conftest import painted
from tests.cli.runs import run as train


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained / "run", tmp_path / "run")


def called(capsys, *words, code=0):
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == code
    return capsys.readouterr()


# ---- fastmp.load ----


def test_a_loaded_model_is_ready(trained):
    model = fastmp.load(trained / "run")
    assert (model.classes, model.training, model.device.type) == (("blue", "red"), False, "cpu")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    red = trained / "colours/red/0.png"
    pixels = model.preprocess(red)
    assert (pixels.shape, pixels.dtype) == ((3, 12, 12), torch.float32)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    logits = model(pixels[None])
    assert logits.argmax() == 1
    assert torch.equal(logits, model((pixels[None] * 255).round().to(torch.uint8)))
    image = pytest.importorskip("PIL.Image").open(red)
    expected = logits.softmax(1)[0, 1].item()
    for given in (red, str(red), image, np.asarray(image)):
        (((name, share), other),) = model.predict(given, top=2)
        assert (name, other.name) == ("red", "blue")
        assert share == pytest.approx(expected, abs=1e-6)
    assert [p[0].name for p in model.predict([red, trained / "colours/blue/1.png"])] == [
        "red",
        "blue",
    ]


def test_a_run_without_its_last_file_is_loaded_from_its_checkpoint(copy):
    whole = fastmp.load(copy).state_dict()
    (copy / "model.safetensors").unlink()
    for path in (copy, copy / "checkpoints", next((copy / "checkpoints").iterdir())):
        state = fastmp.load(path).state_dict()
        if path.name != "checkpoints" and path != copy:  # one of the newest two
            assert state.keys() == whole.keys()
            continue
        assert all(torch.equal(value, whole[name]) for name, value in state.items())


def test_an_unfinished_run_says_so(copy):
    (copy / "model.safetensors").unlink()
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("epochs = 3", "epochs = 9"))
    with pytest.warns(UserWarning, match="is unfinished: .* 3 of 9 epochs done; fastmp train --re"):
        fastmp.load(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="no weights yet: it stopped before its first checkpoint"):
        fastmp.load(copy)


def test_an_older_run_gets_its_files_by_resume(copy, capsys):
    for name in ("classes.json", "preprocessing.json", "model.safetensors"):
        (copy / name).unlink()
    with pytest.raises(RunError, match=r"no classes\.json: .*earlier version.*--resume --out"):
        fastmp.load(copy)
    called(capsys, "train", "--resume", "--out", copy)
    assert fastmp.load(copy).classes == ("blue", "red")


def test_a_model_whose_factory_has_gone(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    body = "import torch\ndef net(shape, classes):\n    return torch.nn.Sequential(\n"
    layers = "        torch.nn.Flatten(), torch.nn.Linear(64, classes))\n"
    (tmp_path / "nets_of_predict.py").write_text(body + layers)
    out, _ = train(tmp_path, "--model", "nets_of_predict:net", "--epochs", "1")
    accuracy = log.read(out / "metrics.jsonl", "epoch")[-1]["val_accuracy"]
    found = json.loads(called(capsys, "evaluate", out, "--json").out)
    assert found["accuracy"] == accuracy  # fp32: the same sums
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    from_module = fastmp.load(out, model=module)
    assert torch.equal(from_module.network[1].weight, fastmp.load(out).network[1].weight)
    monkeypatch.delitem(__import__("sys").modules, "nets_of_predict")
    (tmp_path / "nets_of_predict.py").rename(tmp_path / "moved_of_predict.py")
    with pytest.raises(ModelError, match="there is no module 'nets_of_predict'"):
        fastmp.load(out)
    error = called(capsys, "predict", out, "x.png", code=2).err
    assert "say where it is now with --model" in error
    fastmp.load(out, model="moved_of_predict:net")
    module[1] = torch.nn.Linear(60, 10)
    with pytest.raises(RunError, match=r"model: 1\.weight is \(10, 64\) in the run and \(10, 60\)"):
        fastmp.load(out, model=module)


# ---- fastmp predict ----


def test_predict_prints_a_line_a_picture(trained, capsys):
    red, blue = (trained / f"colours/{name}/3.png" for name in ("red", "blue"))
    lines = called(capsys, "predict", trained / "run", red, blue).out.splitlines()
    assert [line.split()[:2] for line in lines] == [[str(red), "red"], [str(blue), "blue"]]
    assert all(line.endswith("%") for line in lines)
    (line,) = called(capsys, "predict", trained / "run", red, "--top", 5).out.splitlines()
    assert line.split()[1::2] == ["red", "blue"]
    rows = called(capsys, "predict", trained / "run", red.parent, "--json", "--top", 2).out
    rows = [json.loads(row) for row in rows.splitlines()]
    assert len(rows) == 10
    assert {row["class"] for row in rows} == {"red"}
    assert rows[0]["top"][0] == {"class": "red", "probability": rows[0]["probability"]}
    assert sum(entry["probability"] for entry in rows[0]["top"]) == pytest.approx(1)


def test_a_picture_that_is_none_does_not_stop_the_others(trained, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no picture")
    red = trained / "colours/red/3.png"
    files = [tmp_path / "notes.txt", red, tmp_path / "absent.png"]
    done = called(capsys, "predict", trained / "run", *files, code=2)
    (line,) = done.out.splitlines()
    assert line.split()[:2] == [str(red), "red"]
    first, second, last = done.err.splitlines()
    assert "notes.txt cannot be read: expected an image" in first
    assert first.count("notes.txt") == 1
    assert "absent.png does not exist" in second
    assert last == "fastmp predict: error: 2 of 3 pictures could not be read"
    with pytest.raises(DataError, match=r"notes\.txt cannot be read"):
        fastmp.load(trained / "run").predict(files[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict", "nowhere", "x.png"), "nowhere does not exist; expected the folder of a run"),
        (("predict", ".", "x.png"), ". is no run: expected a folder with config.toml"),
        (("evaluate", "nowhere"), "nowhere does not exist"),
        (("export", ".", "--format", "onnx"), ". is no run"),
        (("predict", "{run}"), "images: expected at least one picture, got none"),
        (("predict", "{run}", "{run}/events"), "events: expected images, found none"),
        (("predict", "{run}", "x.png", "--top", "0"), "top: expected a whole number of at least 1"),
        (
            ("evaluate", "{run}", "--data", "nothing"),
            "an existing folder or hf:NAME, got 'nothing'",
        ),
        (("evaluate", "{run}", "--data", "digits"), "expected classes of the model (blue, red)"),
        (("export", "{run}", "--format", "onnx", "--out", "/dev/null/x"), "out: expected a folder"),
    ],
)
def test_bad_inputs_are_one_line(trained, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    words = [word.format(run=trained / "run") for word in words]
    (line,) = called(capsys, *words, code=2).err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"x", "model.safetensors is damaged: "),
        ("classes.json", b"{", "classes.json is damaged: "),
        ("classes.json", b'"red"', "classes.json is damaged: expected a list of names, got 'red'"),
        ("classes.json", b'["red"]', "has the weights of another model: 5.weight is (2, 2048) in"),
        ("preprocessing.json", b"[]", "preprocessing.json is damaged: expected shape, mean, std"),
        ("config.toml", b"=", "config.toml is damaged: "),
    ],
)
def test_damaged_files_of_a_run_are_one_line(copy, capsys, name, content, message):
    (copy / name).write_bytes(content)
    (line,) = called(capsys, "predict", copy, "x.png", code=2).err.splitlines()
    assert message in line


def test_a_run_of_the_trainer_in_python_says_how_its_weights_are_loaded(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunError, match=r"fastmp\.transfer\.load_pretrained\(model, '"):
        fastmp.load(tmp_path)


# ---- fastmp evaluate ----


def test_evaluate_takes_the_images_that_the_run_validated(trained, capsys):
    accuracy = log.read(trained / "run/metrics.jsonl", "epoch")[-1]["val_accuracy"]
    lines = called(capsys, "evaluate", trained / "run").out.splitlines()
    assert any(line.endswith("2 images, 2 correct") for line in lines)
    assert f"accuracy {accuracy:.2%}" in lines
    same = ["--data", trained / "colours", "--json"]
    assert json.loads(called(capsys, "evaluate", trained / "run", *same).out)["images"] == 2


def test_evaluate_other_images(trained, tmp_path, capsys):
    """Of one's own folder all images; the confusion of labels that were exchanged is certain."""
    for name, colour in (("red", "blue"), ("blue", "red")):
        shutil.copytree(trained / "colours" / colour, tmp_path / name)
    found = json.loads(
        called(capsys, "evaluate", trained / "run", "--data", tmp_path, "--json").out
    )
    assert found["confusion"] == [[0, 10], [10, 0]]
    assert found["accuracy"] == 0
    assert found["classes"]["red"] == {"images": 10, "accuracy": 0.0}
    shutil.rmtree(tmp_path / "red")
    page = called(capsys, "evaluate", trained / "run", "--data", tmp_path).out
    assert "no images of 1 of the model's classes: red" in page
    assert page.splitlines()[-3:] == [
        "      blue   red",
        "blue     ·    10",
        "red      ·     ·",
    ]
    painted(tmp_path, ["green"], 1)
    error = called(capsys, "evaluate", trained / "run", "--data", tmp_path, code=2).err
    assert "expected classes of the model (blue, red), got green; rename or remove it" in error


# ---- fastmp export ----


@pytest.mark.parametrize("format", ["safetensors", "onnx", "torch.export"])
def test_an_export_computes_what_the_model_does(trained, tmp_path, capsys, format):
    if format == "onnx":
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = tmp_path / "new" / export.FILES[format]
    words = ["export", trained / "run", "--format", format, "--out", out]
    done = called(capsys, *words)
    assert done.err == ""
    assert done.out.startswith(f"{out}: ")
    model = fastmp.load(trained / "run")
    images = torch.rand(3, *model.preprocessing.shape)
    expected = model(images)
    if format == "safetensors":
        fresh = torch.nn.Sequential(torch.nn.Flatten(), *list(model.network.children())[1:])
        torch.nn.init.zeros_(fresh[1].weight)
        assert len(fastmp.transfer.load_pretrained(fresh, out, strict=True).loaded) == 6
        got = model(images)
    elif format == "onnx":
        assert "checked: " in done.out
        session = runtime.InferenceSession(out)
        (got,) = session.run(None, {"images": images.numpy()})
        assert json.loads(session.get_modelmeta().custom_metadata_map["classes"])[1] == "red"
        got = torch.from_numpy(got)
    else:
        got = torch.export.load(out).module()(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_export_that_differs_is_removed(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_TOLERANCE", -1.0)
    with pytest.raises(export.ExportError, match="computes other logits than the model"):
        export.export(fastmp.load(trained / "run"), "torch.export", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
