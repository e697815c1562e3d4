"""Cases for the processes of ``measure``: each writes its events to a file."""

import os
import time

from fastmp.bench.harness import Case, Row, Timing, announce_compiled


def row(ratio, goals, **about):
    timings = {"fastmp": Timing(1, 1, 1), "torch.mm": Timing(ratio, ratio, ratio)}
    return Row("linear", f"plain, {ratio}", timings, goals=goals, **about)


def case(log, name, ending="rows"):
    """Compiles, waits for its turn and is timed for 0.1 s; or ends in another way."""

    def note(event):
        with log.open("a") as file:
            file.write(f"{event} {name}\n")

    def rows():
        note("compile")
        if ending == "error":
            raise RuntimeError("no such kernel")
        if ending == "hang":
            time.sleep(600)
        while ending == "slow" and "end " not in log.read_text():
            note("compile")
            time.sleep(0.01)
        announce_compiled()
        note("begin")
        if ending == "crash":
            os._exit(1)
        time.sleep(0.1)
        note("end")
        return [row(2.0, {"best": 1.5})]

    return Case(name, rows)
