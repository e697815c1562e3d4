"""The report shows what the run left, escaped, and is whole without the optional parts."""

import html.parser

import pytest

from fastmp import doctor
from fastmp.report import html as report
from fastmp.training import log

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
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)


def written(folder, title="a run", facts=FACTS, **rows):
    writer = log.Log(folder)
    writer.write("step", step=1, **STEP)
    for kind, row in rows.items():
        writer.write(kind, **row)
    writer.close()
    path = report.write(folder, title, facts, ENVIRONMENT)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_everything_that_was_logged_is_shown(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"\x89PNG")
    (tmp_path / "config.toml").write_text('model = "mlp"\nlr = 0.1\n')
    page = written(
        tmp_path,
        epoch=EPOCH,
        overflow={"step": 7, "parameter": "1.weight"},
        resumed={"step": 5},
        telemetry={"step": 1, "gradients": 200, "updates_lost": 3},
    )
    assert page.headings == [
        "Curves", "Epochs", "Overflows", "Telemetry", "More", "Recipe", "Environment",
    ]  # fmt: skip
    for part in ("12,346", "50.00%", "not finite", "1.weight", ", resumed at step 5", "1.5000%",
                 "updates lost", 'model = "mlp"\nlr = 0.1', "a processor"):  # fmt: skip
        assert part in page.text
    assert all(name in page.text and value in page.text for name, value in FACTS.items())


@pytest.mark.usefixtures("commands")
def test_the_report_of_a_training_is_one_file(tmp_path):
    from tests.cli.runs import run

    out, _ = run(tmp_path, "--telemetry", "--model", "mlp", "--dtype", "fp16")
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    for part in ("mlp on digits, fp16", "test accuracy", "label_smoothing = 0.1", "updates lost"):
        assert part in page.text
    if not log.read(out / "metrics.jsonl", "overflow"):
        assert "every gradient of every step was finite" in page.text


def test_a_run_that_was_stopped_early(tmp_path):
    page = written(tmp_path, facts=dict(list(FACTS.items())[:2]))
    assert page.headings == ["Epochs", "Overflows", "Environment"]
    assert "No epoch was finished." in page.text
    assert "every gradient of every step was finite" in page.text
    assert "resumed" not in page.text


def test_names_cannot_become_markup(tmp_path):
    hostile = "<script>alert('&')</script>"
    (tmp_path / "config.toml").write_text(hostile)
    page = written(
        tmp_path, hostile, {hostile: hostile}, overflow={"step": 1, "parameter": hostile}
    )
    assert page.text.count(hostile) == 6  # title twice, fact twice, overflow, recipe


def test_the_environment_needs_no_installed_package(monkeypatch):
    """fastmp may run from a checkout that was never installed, and without git."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: pytest.fail(f"asked for {name}"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    facts = doctor.environment("cpu")
    assert facts["commit"] == "unknown"
    assert {"device", "date", "fastmp", "torch", "python", "system", "operations"} <= set(facts)
    assert facts["device"].endswith("threads")
