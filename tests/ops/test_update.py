"""The operation update: a step without tensors, the backends that carry it out."""

import numpy as np
import pytest
import torch

from fastmp import backends
from fastmp.backends import cpu, registry
from fastmp.backends.abi import Hyperparameters, record_field
from fastmp.ops import update
from fastmp.ops.update.step_table import StepTable


def test_no_tensors_at_all():
    record = update.new_record(torch.device("cpu"))
    update.run(StepTable([], []), np.zeros((0, len(Hyperparameters._fields))), record)
    assert record_field(record, "applied") == 1
    assert record_field(record, "grad_norm") == 0


def test_the_report_names_who_serves_update():
    served = {(row.op, row.device): row for row in backends.report()}["update", "cpu"]
    library, reason = cpu.load()
    assert served.backend == ("reference" if library is None else "cpu")
    assert served.reason == reason


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FASTMP_BACKEND", "tpu")
    with pytest.raises(
        ValueError, match=r"must be one of cpu, cuda, triton \(or unset\), got 'tpu'"
    ):
        registry.forced_backend()
    monkeypatch.setenv("FASTMP_BACKEND", "CPU")
    assert registry.forced_backend() == "cpu"
