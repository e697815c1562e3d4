"""The report shows what the run left, escaped, and is whole without the optional parts."""

import base64
import html.parser
import io

import pytest
import torch
from matplotlib.image import imread

from fastmp.report import html as report
from fastmp.report.environment import environment
from fastmp.training import log
from fastmp.training.confusion import Confusion, Mistake

FACTS = {f"fact {n}": f"value {n}" for n in range(6)}
ENVIRONMENT = {"device": "a processor", "torch": "2.x"}
STEP = {"loss": 2.0, "lr": 0.1, "scale": 8.0, "grad_norm": 1.0, "skipped": False}
EPOCH = {
    "epoch": 1, "step": 2, "train_loss": 2.0, "val_loss": float("inf"), "val_accuracy": 0.5,
    "seconds": 3.0, "samples_per_second": 12345.6,
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Headings, text and links; every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.links, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] in (["h2"], ["h3"]):
            self.headings.append(data)


def written(folder, title="a run", facts=FACTS, about=None, **rows):
    writer = log.Log(folder)
    writer.write("step", step=1, **STEP)
    for kind, row in rows.items():
        writer.write(kind, **row)
    writer.close()
    path = report.write(folder, report.Page(title, facts, ENVIRONMENT, **(about or {})))
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def confused(counts, shape=(1, 4, 4)):
    """The confusion matrix, and one mistake: an image of class 1 that was taken for class 0."""
    image = torch.randint(256, shape, dtype=torch.uint8)
    return Confusion(torch.tensor(counts), (Mistake(image, 1, 0, 0.75),))


def test_everything_that_was_logged_is_shown(tmp_path):
    page = written(
        tmp_path,
        facts={**FACTS, "val accuracy": "50.00% after 1 epoch"},
        about={
            "commands": ["fastmp train --lr 0.1"],
            "data": {"training images": "1,000", "classes": "2: cat, dog"},
            "recipe": {"model": "mlp", "lr": 0.1},
            "classes": ("cat", "dog"),
            "confusion": confused([[7, 0], [3, 2]], (3, 5, 4)),
        },
        epoch=EPOCH,
        overflow={"step": 7, "parameter": "1.weight"},
        resumed={"step": 5},
        telemetry={"step": 1, "gradients": 200, "updates_lost": 3},
    )
    assert page.headings == [
        "Curves", "Epochs", "Classes", "Confusion matrix: a row a class, a column a prediction",
        "Worst mistakes", "Overflows", "Telemetry", "More", "Recipe", "Environment",
    ]  # fmt: skip
    for part in ("12,346", "50.00%", "not finite", "1.weight", ", resumed at step 5", "1.5000%",
                 "updates lost", "fastmp train --lr 0.1", "1,000", "2: cat, dog", "a processor",
                 "40.0%", "dog, taken for cat (75%)", "1 (best)"):  # fmt: skip
        assert part in page.text, part
    assert all(name in page.text and value in page.text for name, value in FACTS.items())
    assert len(page.links) == 3  # curves in light and dark, a mistake
    for link in page.links:
        (head, _, data) = link.partition(",")
        assert head == "data:image/png;base64"
        decoded = imread(io.BytesIO(base64.b64decode(data)))
    assert decoded.shape[:2] == (5, 4)


def test_many_classes_are_a_list_of_mistakes(tmp_path):
    counts = torch.zeros(31, 31, dtype=torch.int64)
    counts[4, 9], counts[1, 2], counts[3, 3] = 5, 8, 9
    names = tuple(f"class {n}" for n in range(31))
    page = written(tmp_path, about={"classes": names, "confusion": Confusion(counts, ())})
    assert "Most frequent mistakes" in page.headings
    listed = page.text[page.text.index("Most frequent") :]
    assert listed.index("class 1class 28") < listed.index("class 4class 95")


@pytest.mark.usefixtures("commands")
def test_the_report_of_a_training_is_one_file(tmp_path):
    from tests.cli.runs import run

    out, _ = run(tmp_path, "--telemetry", "--model", "mlp", "--dtype", "fp16")
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for part in ("mlp on digits, fp16", "val accuracy", "label_smoothing", "loss_scale", "1,433 of",
                 "updates lost", "fastmp train --model mlp", "10: 0, 1, 2"):  # fmt: skip
        assert part in page.text
    assert "cycles" not in page.text
    if not log.read(out / "metrics.jsonl", "overflow"):
        assert "every gradient of every step was finite" in page.text


def test_a_run_that_was_stopped_early(tmp_path):
    page = written(tmp_path, facts=dict(list(FACTS.items())[:2]))
    assert page.headings == ["Curves", "Epochs", "Overflows", "More", "Environment"]
    assert "No epoch was finished." in page.text
    assert "every gradient of every step was finite" in page.text
    assert "resumed" not in page.text


def test_names_cannot_become_markup(tmp_path):
    hostile = "<script>alert('&')</script>"
    page = written(
        tmp_path, hostile, {hostile: hostile}, overflow={"step": 1, "parameter": hostile},
        about={
            "commands": [hostile], "data": {"classes": hostile}, "recipe": {"data": hostile},
            "classes": ("cat", hostile), "confusion": confused([[1, 0], [1, 0]]),
        },
    )  # fmt: skip
    # title twice, fact twice, overflow, command, classes, recipe, per class, matrix twice, mistake
    assert page.text.count(hostile) == 12


def test_the_environment_needs_no_installed_package(monkeypatch):
    """fastmp may run from a checkout that was never installed, and without git."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail(f"asked for {name}"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    facts = environment("cpu")
    assert facts["commit"] == "unknown"
    assert {"device", "date", "fastmp", "torch", "python", "system", "operations"} <= set(facts)
    assert facts["device"].endswith("threads")
