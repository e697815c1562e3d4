"""``python -m benchmarks [--quick] [subject ...]``: time the subjects, write results/<device>/."""

from __future__ import annotations

import argparse

import torch

from benchmarks import harness, linear, loss, optimizer, training

SUBJECTS = {"optimizer": optimizer, "loss": loss, "linear": linear, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="small and unsaved: does it run?")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.subjects or SUBJECTS:
        rows, copy = SUBJECTS[name].rows(options.quick), harness.copy_bandwidth()
        print(f"\n{name}\n\n{harness.table(rows, copy)}\n", flush=True)
        if not options.quick:
            print(f"written to {harness.write(name, rows, copy)}")


if __name__ == "__main__":
    main()
