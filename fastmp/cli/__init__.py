"""The command line: one module a command."""

from fastmp.cli.main import main

__all__ = ["main"]
