"""The suite itself: every test checks something, and the oldest versions are tried."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# Calls that check: of pytest, torch.testing, NumPy and this suite (helpers and fixtures).
CHECKS = ("agree", "assert", "check", "compiled", "exec", "fail", "opcheck", "raises", "warns")


def called(function):
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).split(".")[-1]


def unchecked(source):
    """The names of the test functions without an assert statement or a call that checks."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
        if not any(name.startswith(CHECKS) for name in called(node))
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda p: p.stem)
def test_every_test_checks_something(path):
    assert unchecked(path.read_text()) == []


def test_the_scan_finds_a_test_without_a_check():
    assert unchecked("def test_a():\n    f()\ndef test_b():\n    assert f()\n") == ["test_a"]


def test_make_test_oldest_tries_the_lowest_versions_that_are_allowed():
    makefile, project = (TESTS.parent / name for name in ("Makefile", "pyproject.toml"))
    (line,) = re.findall(r"^OLDEST := (.*)$", makefile.read_text(), re.MULTILINE)
    pins = dict(pin.split("==") for pin in line.split())
    described = tomllib.loads(project.read_text())["project"]
    allowed = sum(described["optional-dependencies"].values(), described["dependencies"])
    floors = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(allowed), re.MULTILINE))
    assert floors.keys() == pins.keys()
    assert all(f"{pins[name]}.".startswith(f"{floor}.") for name, floor in floors.items())
