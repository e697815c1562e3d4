"""The pages: code runs, commands parse, links resolve, docstrings are complete."""

import ast
import inspect
import re
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

import fastmp
from fastmp import amp, data, functional, nn, optim, schedule, transfer
from fastmp.optim import lr_scheduler
from tests.cli.conftest import painted

tyro = pytest.importorskip("tyro", reason="tyro is not installed: no command line to try")

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def playground():
    """The names that examples use without definition."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.randint(256, (8, 1, 3, 4), dtype=torch.uint8)
    return {
        "fastmp": fastmp, "torch": torch, "model": model, "transfer": transfer,
        "loader": [(images, torch.randint(3, (8,)))] * 3, "lr": 1e-3, "steps": 30,
    }  # fmt: skip


CODE = [(page, n) for page in PAGES for n in range(len(blocks(page, "python")))]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A folder with a run in runs/pets, and a picture."""
    pytest.importorskip("PIL", reason="pillow is not installed: no image files")
    from fastmp import cli

    folder = tmp_path_factory.mktemp("pages")
    painted(folder / "pets", ("cat", "dog"))
    shutil.copy(folder / "pets" / "cat" / "0.png", folder / "cat.jpg")
    flags = ["--data", folder / "pets", "--out", folder / "runs" / "pets", "--model", "mlp"]
    flags += ["--dtype", "fp32", "--epochs", "1", "--batch-size", "4", "--workers", "0"]
    assert cli.main(["train", *map(str, flags)]) == 0
    return folder


@pytest.mark.parametrize(("page", "number"), CODE, ids=lambda v: getattr(v, "name", str(v)))
def test_python_on_the_pages_runs(page, number, request, monkeypatch):
    if "runs/pets" in blocks(page, "python")[number]:
        monkeypatch.chdir(request.getfixturevalue("finished_run"))
    exec(compile(blocks(page, "python")[number], page.name, "exec"), playground())


def side(diff, sign):
    """The code with (+) or without (-) the change."""
    kept = [line for line in diff.splitlines() if not line.startswith("-+".replace(sign, ""))]
    return "\n".join(line[2:] for line in kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_swap_under_autocast(dtype):
    """What the README says below its diff: fp32 inputs, the forward pass still under autocast."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    names = playground()
    exec(side(diff, "+").replace("torch.float16", str(dtype)), names)
    before = [p.detach().clone() for p in names["model"].parameters()]
    with torch.autocast("cpu", dtype):
        loss = names["criterion"](names["model"](torch.randn(8, 1, 3, 4)), torch.randint(3, (8,)))
    loss.backward()
    names["optimizer"].step()
    after = names["model"].parameters()
    assert all(p.dtype == dtype for p in names["model"].parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("sign", ["-", "+"])
def test_both_sides_of_the_swap_train(sign):
    """The README's diff in a training step."""
    (diff,) = blocks(ROOT / "README.md", "diff")
    names = playground()
    dtype = torch.float16 if sign == "+" else torch.float32
    exec(compile(side(diff, sign), "README.md", "exec"), names)
    assert isinstance(names["optimizer"], fastmp.optim.AdamW) == (sign == "+")
    before = [p.detach().clone() for p in names["model"].parameters()]
    x, y = torch.randn(8, 1, 3, 4, dtype=dtype), torch.randint(3, (8,))
    loss = names["criterion"](names["model"](x), y)
    names["optimizer"].zero_grad()
    if sign == "-":  # torch's scaler defaults to CUDA; on a CPU it is disabled
        assert not names["scaler"].is_enabled() or torch.cuda.is_available()
    loss.backward()
    names["optimizer"].step()
    after = [p.detach() for p in names["model"].parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- commands ----


def commands():
    """Every command line of fastmp and make in the indented blocks and code spans of the pages."""
    for page in PAGES:
        text = page.read_text()
        lines = re.findall(r"^    (?:.* )?((?:fastmp|make) [^\n]*)", text, re.MULTILINE)
        lines += re.findall(r"`((?:fastmp|make) [a-z][^`\n]*)`", text)
        for line in lines:
            yield pytest.param(
                line.split("  ")[0].split(" #")[0].strip(), id=f"{page.name}: {line[:50]}"
            )


TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", list(commands()))
def test_commands_on_the_pages_parse(line, monkeypatch):
    """fastmp's parser accepts them; no command runs."""
    words = shlex.split(line.replace("...", ""))
    if words[0] == "make":
        assert words[1] in TARGETS
        return
    from fastmp.cli.main import COMMANDS, main

    assert words[1] in COMMANDS
    if words[1] in ("verify", "doctor"):  # argparse's
        from fastmp.cli import doctor, verify

        {"doctor": doctor, "verify": verify}[words[1]].parser().parse_args(words[2:])
        return
    parsed = []
    real = tyro.cli

    def parse(*arguments, **options):
        options["args"] = list(options.get("args") or [])
        parsed.append(real(*arguments, **options))
        raise KeyboardInterrupt  # instead of running it

    monkeypatch.setattr(tyro, "cli", parse)
    names = {"DIR": "run", "RUN": "run", "FOLDER": "folder", "IMAGE": "image.png"}
    arguments = [names.get(word, word) for word in words[1:]]
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        return
    try:
        main(arguments)
    except SystemExit as stop:
        pytest.fail(f"{line!r} is refused: {stop.code}")
    assert parsed


# ---- links ----


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_tests_exist(page):
    for name in re.findall(r"`(?:tests/)?((?:\w+/)*test_\w+)(?:\.py)?`", page.read_text()):
        assert (ROOT / "tests" / f"{name}.py").exists(), name


# ---- docstrings ----


def public():
    """Public functions and classes, by full name."""
    modules = [fastmp, amp, data, functional, nn, optim, schedule, lr_scheduler, transfer]
    for module in modules:
        listed = getattr(module, "__all__", None)
        for name in listed or [n for n in vars(module) if not n.startswith("_")]:
            thing = getattr(module, name)
            defined_in = getattr(thing, "__module__", "")
            ours = defined_in.startswith("fastmp") if listed else defined_in == module.__name__
            if ours and (inspect.isfunction(thing) or inspect.isclass(thing)):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")


every_public = pytest.mark.parametrize("thing", list(public()))
INHERITS = re.compile(
    r"[Aa]rguments,? (and )?errors (are|as)|arguments, errors|as in torch|torch's own"
)
SHAPE = re.compile(r"\([\w., *]*\)|0-d|scalar|shape|dense|in torch", re.IGNORECASE)
DTYPE = re.compile(r"fp16|bf16|fp32|int64|uint8|bool|dtype|in torch")


def callables(thing):
    """(name, function, docstring) of a function, or of a class's constructor and methods."""
    text = inspect.getdoc(thing) or ""
    if not inspect.isclass(thing):
        return [(thing.__name__, thing, text)]
    constructors = ("__init__", "__post_init__", "__call__")
    return [
        (name, method, f"{text}\n{inspect.getdoc(method)}")
        for name, method in vars(thing).items()
        if inspect.isfunction(method) and (name in constructors or not name.startswith("_"))
        if inspect.getsourcefile(method) == inspect.getsourcefile(thing)  # not dataclass's
    ]


@every_public
def test_docstrings_name_every_argument(thing):
    """In the docstring of the function or the class."""
    text = inspect.getdoc(thing) or ""
    assert len(text) > 40
    if inspect.isclass(thing) and issubclass(thing, BaseException):
        return
    given = inspect.signature(thing).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in given if p.kind not in kinds]
    missing = [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert not missing or INHERITS.search(text), missing


@every_public
def test_docstrings_of_tensors_give_shape_and_dtype(thing):
    for name, function, text in callables(thing):
        signature = inspect.signature(function)
        kinds = [str(p.annotation) for p in signature.parameters.values()]
        if any("Tensor" in kind for kind in [*kinds, str(signature.return_annotation)]):
            assert SHAPE.search(text), f"{name}: no shape"
            assert DTYPE.search(text), f"{name}: no dtype"


@every_public
def test_docstrings_name_the_errors_that_are_raised(thing):
    """Errors raised in the function's own lines, not in functions that it calls."""
    for name, function, text in callables(thing):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        checks = [c for c in calls if ast.unparse(c.func).startswith("_check")]
        raised = {"ValueError"} if checks and thing.__module__ == schedule.__name__ else set()
        raised |= {
            ast.unparse(node.exc.func)
            for node in ast.walk(tree)
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        }
        missing = {e for e in raised if e[0].isupper() and e not in text}
        assert not missing or INHERITS.search(text), f"{name}: {missing}"


# Base classes and adapters: they compute no formula.
FORMULA_FREE = {"Bindable", "Constant", "LRScheduler", "Schedule", "bind", "apply", "evaluate"}


@pytest.mark.parametrize(
    "thing",
    [p for p in public() if p.id.split(".")[1] in ("functional", "nn", "optim", "schedule")],
)
def test_docstrings_give_the_source_of_the_formula(thing):
    """A paper, or the function of torch with equal values."""
    text = inspect.getdoc(thing) or ""
    known = thing.__name__ in FORMULA_FREE | {"MixedTarget"}
    assert known or re.search(r"\d{4}\.\d{5}|``torch\.|et al|[A-Z]\w+ (&|and) [A-Z]", text)
