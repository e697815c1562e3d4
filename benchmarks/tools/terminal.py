"""The README's recording of a terminal, docs/terminal.svg, of a real run of ``fastmp``.

    python -m benchmarks.tools.terminal train --dtype bf16 --epochs 5 --out runs/digits

The command runs in a terminal of 80 columns, in an empty folder. A line appears when it was last
written to; the run's seconds are shortened to eight.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import tempfile
import termios
import time
from html import escape
from pathlib import Path

PICTURE = Path(__file__).parents[2] / "docs" / "terminal.svg"
COLUMNS, ROWS = 80, 50
SECONDS = 8.0
_TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Screen:
    """The lines of a terminal, with the seconds at which they were last written to."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float]] = [("", 0.0)]
        self._row = self._column = 0

    def write(self, text: str, now: float) -> None:
        """Text with carriage returns and the escape sequences that move up or erase a line."""
        for number, letter, back, feed, plain in _TOKEN.findall(text):
            if letter == "A":
                self._row = max(0, self._row - int(number or 1))
            elif letter == "K":
                self._put(self._row, self.lines[self._row][0][: self._column], now)
            elif back:
                self._column = 0
            elif feed:
                self._row += 1
                if self._row == len(self.lines):
                    self.lines.append(("", now))
            elif plain:
                line = self.lines[self._row][0].ljust(self._column)
                end = self._column + len(plain)
                self._put(self._row, line[: self._column] + plain + line[end:], now)
                self._column = end

    def _put(self, row: int, line: str, now: float) -> None:
        if line != self.lines[row][0]:
            self.lines[row] = (line, now)


def record(arguments: list[str]) -> list[tuple[str, float]]:
    """The lines of ``fastmp`` with these arguments, and their seconds.

    Raises:
        RuntimeError: it failed.
    """
    screen, start = Screen(), time.perf_counter()
    root = str(Path(__file__).parents[2])
    with tempfile.TemporaryDirectory() as folder:
        terminal, end = os.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        run = subprocess.Popen(
            [sys.executable, "-m", "fastmp", *arguments],
            stdin=end, stdout=end, stderr=end, cwd=folder,
            env={**os.environ, "PYTHONPATH": root, "COLUMNS": str(COLUMNS), "TERM": "xterm"},
        )  # fmt: skip
        os.close(end)
        try:
            while output := os.read(terminal, 65536):
                screen.write(output.decode(errors="replace"), time.perf_counter() - start)
        except OSError:
            pass  # the end of a terminal, on Linux
        status = run.wait()
    os.close(terminal)
    lines = [(line.rstrip(), at) for line, at in screen.lines]
    if status:
        raise RuntimeError("\n".join(line for line, _ in lines))
    while lines and not lines[-1][0]:
        lines.pop()
    return lines


def svg(command: str, lines: list[tuple[str, float]]) -> str:
    """The picture; without animation, as in print, every line is there."""
    lines = [
        (line[start : start + COLUMNS], at)
        for line, at in [(f"$ {command}", 0.0), *lines]
        for start in range(0, max(len(line), 1), COLUMNS)
    ]
    end = max(at for _, at in lines) or 1.0
    height = 20 * len(lines) + 56
    texts = [
        f'<text class="l" x="20" y="{52 + 20 * i}" xml:space="preserve" '
        f'style="animation-delay:{at / end * SECONDS:.2f}s">{escape(line)}</text>'
        for i, (line, at) in enumerate(lines)
    ]
    dots = [
        f'<circle cx="{22 + 18 * i}" cy="18" r="5" fill="{color}"/>'
        for i, color in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" font-size="13" '
            'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" '
            'fill="#d7dae0">',
            f"<title>{escape(command)}</title>",
            "<style>.l{animation:a .01s step-end backwards}"
            "@keyframes a{from{opacity:0}to{opacity:1}}</style>",
            f'<rect width="720" height="{height}" rx="8" fill="#1e2127"/>',
            *dots,
            *texts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    given = sys.argv[1:] or ["train"]
    PICTURE.write_text(svg(" ".join(["fastmp", *given]), record(given)))
