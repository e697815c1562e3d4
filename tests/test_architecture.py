"""The layers: imports point downwards only, and the library imports no heavy package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmp

PACKAGE = Path(fastmp.__file__).parent

# Public names -> operations -> devices. A module may import from lower layers and its own.
LAYERS = [
    ["backends", "files", "schedule"],
    ["ops"],
    ["functional"],
    ["nn", "optim", "data"],
    ["amp", "models", "checkpoint"],
    ["distributed", "transfer"],
    ["training", "report"],
    ["verification"],
    ["__init__"],
    ["recipe", "bench", "doctor"],
    ["cli", "__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def layer_name(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """The modules of fastmp that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            parts = node.module.split(".")
            if parts[0] == "fastmp":
                yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
            assert node.level == 0, f"{path}: relative import"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "fastmp":
                    yield parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = LAYER[layer_name(path)]
    for name in imported(path):
        there = LAYER.get(name, LAYER["__init__"])  # a public name: it comes from __init__
        assert there <= here, f"{layer_name(path)} imports {name}, a higher layer"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: p.name)
def test_operations_name_no_device(path):
    words = re.findall("cpu|cuda|triton", path.read_text(), re.IGNORECASE)
    assert not words, f"{path}: kernels register themselves, see backends/registry.py"


@pytest.mark.parametrize("path", sorted((PACKAGE / "backends").rglob("*.py")), ids=lambda p: p.name)
def test_backends_call_no_operation(path):
    """An operation chooses a backend: the call would go up, and back down."""
    assert "torch.ops.fastmp." not in path.read_text().replace("``torch.ops.fastmp.", "")


#: Functions of torch that make tensors of the default dtype, and of whole numbers.
MAKERS = {
    "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"
}  # fmt: skip
WHOLE = {"arange", "as_tensor", "randint", "randperm"}
#: Commands and checks, in processes of their own, and networks, which are made as the caller says.
BY_DEFAULT = {"bench", "cli", "verification.py", "models/builtin.py", "models/classifier.py"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_tensors_are_made_on_a_device_and_in_a_dtype_that_are_named(path):
    """torch.set_default_device("cuda") and set_default_dtype are for the user's tensors."""
    own = path.relative_to(PACKAGE)
    if own.parts[0] in BY_DEFAULT or str(own) in BY_DEFAULT:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
            made, named = ast.unparse(node.func)[6:], {keyword.arg for keyword in node.keywords}
            assert made not in MAKERS | WHOLE or "device" in named, ast.unparse(node)
            assert made not in MAKERS or "dtype" in named, ast.unparse(node)


def test_importing_the_library_imports_no_package_of_the_trainer():
    """The drop-ins need torch and numpy; progress bars, plots and data sets belong to the CLI."""
    heavy = ["tyro", "matplotlib", "sklearn", "safetensors", "triton"]
    code = "import sys, fastmp; print([m for m in %r if m in sys.modules])" % heavy  # noqa: UP031
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_dir_shows_the_public_names_and_a_star_import_gives_them():
    code = (
        "import fastmp; print(*dir(fastmp)); before = set(globals()) | {'before'}\n"
        "from fastmp import *; print(*sorted(set(globals()) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, given = done.stdout.splitlines()
    assert shown.split() == given.split() == sorted(fastmp.__all__)


# ---- sizes: a file is read in one sitting, a function on one screen ----


def test_entries_and_layers_are_few():
    entries = [p for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert len(entries) <= 22
    assert len(LAYERS) <= 11
    assert {p.name.removesuffix(".py") for p in entries} == set(LAYER)


def test_the_trainer_is_at_most_300_lines():
    assert len((PACKAGE / "training" / "trainer.py").read_text().splitlines()) <= 300


def lines_of(function):
    """Its lines, without the docstring."""
    described = ast.get_docstring(function) is not None
    docstring = function.body[0].end_lineno - function.body[0].lineno + 1 if described else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_at_most_60_lines(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    assert {f.name: lines_of(f) for f in functions if lines_of(f) > 60} == {}
