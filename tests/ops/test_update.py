"""The operation fastmp::update_ itself: schema, fake, compile, backends."""

import pytest
import torch

from fastmp import backends
from fastmp.backends import cpu
from fastmp.backends.abi import record_field
from fastmp.ops import update
from fastmp.ops.update.rules import Hyper

ADAM = Hyper(0, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, decoupled=1)


def arguments(dtype=torch.float32, sizes=(5, 0, 300)):
    params = [torch.randn(n).to(dtype) for n in sizes]
    masters = {
        torch.float32: [torch.empty(0) for _ in sizes],
        torch.float16: [p.float() for p in params],
        torch.bfloat16: [torch.zeros(n, dtype=torch.int16) for n in sizes],
    }[dtype]
    states = [torch.zeros(n) for n in sizes for _ in range(2)]
    steps = [torch.zeros(()) for _ in sizes]
    hypers = torch.tensor([ADAM], dtype=torch.float64)
    record = update.new_record(torch.device("cpu"))
    grads = [torch.randn(n).to(dtype) for n in sizes]
    groups = [0] * len(sizes)
    scale = torch.tensor(2.0)
    return (params, grads, masters, states, steps, groups, hypers, scale, None, 1.0, record)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(opcheck, dtype):
    opcheck(torch.ops.fastmp.update_.default, arguments(dtype))


def test_no_tensors_at_all():
    record = update.new_record(torch.device("cpu"))
    hypers = torch.zeros(0, 10, dtype=torch.float64)
    torch.ops.fastmp.update_([], [], [], [], [], [], hypers, None, None, -1.0, record)
    assert record_field(record, "applied") == 1
    assert record_field(record, "grad_norm") == 0


def test_compiled_without_a_graph_break():
    torch.manual_seed(0)
    eager = arguments()
    torch.manual_seed(0)
    compiled = arguments()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*args):
        torch.ops.fastmp.update_(*args)

    torch.ops.fastmp.update_(*eager)
    step(*compiled)
    assert all(map(torch.equal, eager[0], compiled[0]))
    assert all(map(torch.equal, eager[3], compiled[3]))
    assert record_field(compiled[-1], "applied") == 1


def test_the_report_names_who_serves_update():
    served = {(row.op, row.device): row for row in backends.report()}["update", "cpu"]
    library, reason = cpu.load()
    assert served.backend == ("reference" if library is None else "cpu")
    assert served.reason == reason


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FASTMP_BACKEND", "tpu")
    with pytest.raises(
        ValueError, match=r"must be one of cpu, triton, cuda \(or unset\), got 'tpu'"
    ):
        backends.required()
    monkeypatch.setenv("FASTMP_BACKEND", "CPU")
    assert backends.required() == "cpu"
