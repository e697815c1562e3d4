"""The machine code of Muon's grouped products: matrix instructions, 16-byte accesses."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: nothing to compile")

from fastmp.backends.newton_schulz import Batch
from fastmp.backends.triton import architecture
from fastmp.backends.triton.orthogonalize import GroupedIteration
from fastmp.ops.orthogonalize import instructions
from tests.kernels.compile.harness import SM_WARPS
from tests.kernels.compile.test_linear import MATRIX

pytestmark = pytest.mark.slow


def _iterate(n):
    """Each kernel of a step once, for wide and for tall matrices."""
    device = torch.device("cpu")
    shapes = ((n, 2 * n), (2 * n, n))
    coefficients = (3.4445, -4.7750, 2.0315)
    batches = [Batch(1, *s, 1.0, 1e-7, instructions(*s, coefficients, 5)) for s in shapes]
    launches = GroupedIteration(batches, device, early=architecture(device) >= 90).launches
    different = {(of.kernel, *of.options.values(), of.args[3] is None): of for of in launches}
    for launch in different.values():
        launch()


@pytest.mark.parametrize(("n", "programs"), [(64, 3), (384, 2)], ids=["small tile", "large tile"])
def test_products(compiled, n, programs):
    """No spills, and as many programs on a multiprocessor as the tile counts on."""
    for kernel in compiled(_iterate, n):
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
