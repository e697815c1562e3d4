"""The results of steps: their order, and what the optimizer's groups show."""

from __future__ import annotations

import torch

from fastmp.training import step_log


def test_a_record_keeps_step_and_values():
    record = step_log.Record(3, [torch.tensor(0.5), torch.tensor(2)])
    assert record.step == 3
    assert record.read() == [0.5, 2.0]
