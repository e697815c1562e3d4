"""The machine code of Muon's grouped products: matrix instructions, 16-byte accesses."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastmp.backends.newton_schulz import Batch
from fastmp.backends.triton.orthogonalize import GroupedIteration
from fastmp.ops.orthogonalize import instructions
from tests.kernels.compile.harness import SM_WARPS, record_launches
from tests.kernels.compile.test_linear import MATRIX

pytestmark = pytest.mark.slow


def _launches(n):
    """Of wide and of tall matrices."""
    shapes = ((n, 2 * n), (2 * n, n))
    coefficients = (3.4445, -4.7750, 2.0315)
    batches = [Batch(1, *s, 1.0, 1e-7, instructions(*s, coefficients, 5)) for s in shapes]
    return GroupedIteration(batches, torch.device("cpu")).launches


def _iterate(n):
    """Each kernel of a step once."""
    launches = _launches(n)
    different = {(of.kernel, *of.options.values(), of.args[3] is None): of for of in launches}
    for launch in different.values():
        launch(0)


def _step_three_times():
    launches = _launches(64)
    for _ in range(3):
        for launch in launches:
            launch(0)


@pytest.mark.parametrize(("n", "programs"), [(64, 3), (384, 2)], ids=["small tile", "large tile"])
def test_products(compiled, n, programs):
    """No spills, and as many programs on a multiprocessor as the tile counts on."""
    fields = {"_product_kernel": 11, "_normalize_kernel": 1}  # of a program, in its table
    for kernel in compiled(_iterate, n, table_loads=fields):
        assert (kernel.count("ACQBULK") == kernel.count("PREEXIT") == 1) == (kernel.arch >= 90)
        if kernel.name == "_normalize_kernel":
            assert kernel.count(r"LDG\..*\.128") == kernel.count(r"STG\..*\.128") == 4
            continue
        assert kernel.count(MATRIX[kernel.arch]) >= 4
        assert kernel.count(r"LDGSTS\..*\.128") >= 8
        assert kernel.count(r"STG\..*\.128") >= 4
        assert kernel.count(r"(LDG|STG)\..*\.(U16|S16|U8)") == 0
        least = 1 if (kernel.arch, n) == (80, 384) else programs
        assert kernel.occupancy() * SM_WARPS[kernel.arch] >= least * kernel.warps


def test_later_launches_are_the_first(pool):
    """They go past Triton's look at the arguments."""
    made = pool.submit(record_launches, _step_three_times, ()).result()
    count = len(made) // 3
    assert made[:count] == made[count : 2 * count] == made[2 * count :]
    assert {name for name, *_ in made} == {"_product_kernel", "_normalize_kernel"}
    tables = [args[-4] for name, _, _, args in made[:count] if name == "_product_kernel"]
    assert len(set(tables)) == 5  # one for each kind of product and way round
