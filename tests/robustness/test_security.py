"""fastmp unpickles no file, starts no shell and writes into its own folders only."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastmp

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    [*Path(fastmp.__file__).parent.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
)

# Modules and calls that run code from a file or from user input.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pty"}
CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "torch.jit.load", "torch.hub.load",
         "subprocess.getoutput", "subprocess.getstatusoutput"}  # fmt: skip


def name_of(node):
    """As in "torch.load"."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call, name):
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def faults(tree):
    """(line, name) of every forbidden import and call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from ((node.lineno, n) for n in names if n.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        if called in CALLS:
            yield node.lineno, called
        if called.endswith("torch.load") and keyword(node, "weights_only") is not True:
            yield node.lineno, "torch.load without weights_only"
        if called.endswith("np.load") and keyword(node, "allow_pickle") is True:
            yield node.lineno, "np.load with allow_pickle"
        if called.startswith("subprocess.") and keyword(node, "shell"):
            yield node.lineno, "a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_nothing_is_unpickled_and_no_shell_is_started(path):
    assert list(faults(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(word)",
        "os.system(word)",
        "subprocess.run(word, shell=True)",
    ],
)
def test_the_search_finds_every_kind(line):
    assert len(list(faults(ast.parse(line)))) == 1


WATCHED = """
import json, os, sys
written = set()
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else 0
        if isinstance(path, (str, bytes)) and writes:
            written.add(os.path.realpath(os.fsdecode(path)))
    elif event in ("os.mkdir", "os.rename", "shutil.copyfile", "os.link", "os.symlink"):
        paths = arguments[1:2] if event in ("os.rename", "shutil.copyfile") else arguments[:1]
        written.update(os.path.realpath(os.fsdecode(p)) for p in paths)
    elif event in ("os.system", "pty.spawn"):
        written.add(f"shell: {arguments}")
sys.addaudithook(watch)
from fastmp import cli
code = cli.main(json.loads(sys.argv[1]))
print("WRITTEN " + json.dumps(sorted(written)))
sys.exit(code)
"""


def written(arguments, home, where):
    """Every path that the command wrote, created or renamed to."""
    environment = {
        **os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"),
        "FASTMP_CACHE": str(home / "cache"), "MPLCONFIGDIR": str(home / "matplotlib"),
        "TORCHINDUCTOR_CACHE_DIR": str(home / "tmp"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(arguments)],
        cwd=where, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("WRITTEN ")]
    return [Path(p) for p in json.loads(line.removeprefix("WRITTEN "))]


@pytest.mark.slow
@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--epochs", "1", "--out", "OUT", "--model", "mlp"],
        ["lr-find", "--picture", "OUT/curve.png"],
        ["verify"],
        ["doctor"],
    ],
    ids=lambda a: a[0],
)
def test_commands_write_only_into_their_folders(arguments, tmp_path):
    """The folder of the run, the cache and the temporary folders of fastmp's dependencies."""
    home, out, here = tmp_path / "home", tmp_path / "run", tmp_path / "here"
    here.mkdir()
    given = [a.replace("OUT", str(out)) for a in arguments]
    allowed = (home, out, Path("/dev"), Path("/proc"))
    stray = [p for p in written(given, home, here) if not p.is_relative_to(tmp_path)]
    assert [p for p in stray if not any(p.is_relative_to(a) for a in allowed)] == []
    assert list(here.iterdir()) == []
    if any("OUT" in a for a in arguments):
        assert out.is_dir()
    made = {p.name for p in home.iterdir()} - {"tmp", "cache", "matplotlib"}
    assert made == set()
