"""``python -m fastmp`` and the ``fastmp`` script."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; the exit code."""
    try:
        from fastmp import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastmp"):
            raise
        print(
            f"fastmp: error: the command line needs {error.name!r}; "
            "install it with: pip install 'fastmp[train]'",
            file=sys.stderr,
        )
        return 2
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
