"""What each ``torch.ops.fastmp`` operation takes and gives, as ``contracts.json`` has it on record.

torch.compile finds the code that it kept on disk by the names of the operations in a graph: neither
their schemas nor their fakes are part of the key. Code compiled before an update of fastmp, for
outputs of other shapes or dtypes, would be run. So a name keeps its contract.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmp.backends import registry
from fastmp.backends.abi import Reduction

RECORD = Path(__file__).parent / "contracts.json"
N, K, C = 5, 3, 7
# Shapes by the name of the argument; others are a number, "()".
SHAPES = {
    **dict.fromkeys(("logits", "grad", "saved"), (N, C)),
    "input": (N, K),
    "linear_weight": (C, K),
    "linear_bias": (C,),
    "bias": (C,),
    "row_grad": (N,),
    "lam": (N,),
}
SHAPES_OF = {
    "linear": {"weight": (C, K)},
    "linear_backward": {"weight": (C, K)},
    "linear_loss_second_sweep": {"stats": (N, 4)},
    "loss_columns_": {"rows": (N, 6)},
    "mix": {"input": (N, 3, 4, 4), "index": (N,), "box": (4,), "scale": (3,), "shift": (3,)},
}
NUMBERS = {"chunk": 2, "ignore_index": -100, "first": 0, "smoothing": 0.1}


def argument(op, described, dtype, on, reduction):
    """The example of one argument; ``on``: what is optional is there, in another order of dims."""
    name, kind = described.name, str(described.type)
    if kind.startswith("Optional") and not on:
        return None
    if "Tensor" in kind:
        if name.startswith("target") or name in ("index", "box"):
            return torch.zeros(SHAPES_OF.get(op, {}).get(name, (N,)), dtype=torch.int64)
        shape = SHAPES_OF.get(op, {}).get(name, SHAPES.get(name, ()))
        if name == "weight" and shape == ():  # of classes
            shape = (C,)
        if name == "stats" and shape == ():
            shape = (N + 1, 2)
        example = torch.zeros(shape, dtype=dtype)
        return example.mT.contiguous().mT if on and example.dim() >= 2 else example
    choices = {"needs": [on] * 3, "activation": "gelu", "reduction": int(reduction), "dtype": dtype}
    return choices.get(name, NUMBERS.get(name, on))


def outputs(name, *case):
    """Dtypes, shapes and strides that the operation's fake gives for the example."""
    op = getattr(torch.ops.fastmp, name).default
    with FakeTensorMode():
        given = op(*(argument(name, described, *case) for described in op._schema.arguments))
    given = () if given is None else (given,) if isinstance(given, torch.Tensor) else given
    return ", ".join(f"{str(t.dtype)[6:]} {tuple(t.shape)} {t.stride()}" for t in given)


def contract(name):
    """The schema, and the distinct outputs of the examples."""
    cases = itertools.product(
        (torch.float16, torch.float64),
        (False, True),
        (Reduction.NONE, Reduction.MEAN, Reduction.SUM),
    )
    return [registry._torch_ops[name].schema, *dict.fromkeys(outputs(name, *c) for c in cases)]


@pytest.mark.parametrize("name", sorted(registry._torch_ops))
def test_an_operation_whose_contract_changes_gets_a_new_name(name):
    found, record = contract(name), json.loads(RECORD.read_text())
    assert found == record.get(name), (
        f"Compiled code on the disks of users knows fastmp::{name} as it was. Give the operation "
        f"another name ({name}_2) and put it on record: python -m tests.ops.test_contracts"
    )


PROGRAM = """
import sys, torch
from fastmp.backends import registry
name, more = sys.argv[1], int(sys.argv[2])
op = lambda x: x.new_ones(len(x) + more)
registry.define("probe", registry.TorchOp(f"{name}(Tensor x) -> Tensor", op, op))
compiled = torch.compile(lambda x: getattr(torch.ops.fastmp, name)(x), fullgraph=True)
print(len(compiled(torch.zeros(3))))
"""


@pytest.mark.slow
def test_a_new_name_is_what_compiled_code_on_disk_is_not_found_by(tmp_path, monkeypatch):
    """Two versions of an operation: under one name the second process meets the first's code."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def run(*arguments):
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    first, stale, renamed = run("probe", "0"), run("probe", "1"), run("probe_2", "1")
    assert first.stdout.startswith("3"), first.stderr
    assert "AssertionError: expected size 4==3" in stale.stderr
    assert renamed.stdout.startswith("4"), renamed.stderr


if __name__ == "__main__":
    record = {name: contract(name) for name in sorted(registry._torch_ops)}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
