"""Command lines of fastmp in processes that run at the same time."""

import os
import subprocess
import sys


def at_once(*lines, home=None):
    """The output of each command line; all of them run at the same time."""
    environment = {**os.environ, **({"HOME": home} if home else {})}
    if home:
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "FASTMP_CACHE", "MPLCONFIGDIR"):
            environment.pop(name, None)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "fastmp", *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for words in lines
    ]  # fmt: skip
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(lines), printed
    return printed


HOLD = "import sys, fastmp.files as f, pathlib\nwith f.locked(pathlib.Path(sys.argv[1])):\n" + (
    "    print('held', flush=True); sys.stdin.read()"
)


def holder(folder):
    """A process that holds the folder until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process
