"""update.cu, compiled by NVRTC for every architecture as on a user's machine: what came out."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.kernels.compile.harness import ARCHITECTURES, look_at

pytest.importorskip("cuda.bindings", reason="cuda.bindings is not installed: no NVRTC")

from fastmp.backends.cuda import launch, nvrtc
from fastmp.backends.cuda.update import case_of
from fastmp.ops.update.rules import RULES

pytestmark = pytest.mark.slow

F32, F16, BF16 = range(3)
KEPT = {"fp32": (F32, F32, 0), "fp16": (F16, F16, 1), "bf16 split": (BF16, BF16, 2)}
STATES = {0: 2, 1: 3, 2: 0, 3: 1, 4: 1, 5: 1, 6: 0}  # of each rule


def build(*cases):
    """The kernel for these arguments of ``case_of``, for every architecture."""
    name = launch.kernel_name(tuple(case_of(*kind) for kind in cases))

    def one(arch):
        image = nvrtc.compile("cuda/update.cu", name, f"sm_{arch}")
        return look_at("update", arch, image.code, 8, 0)

    with ThreadPoolExecutor(
        torch.get_num_threads()
    ) as pool:  # NVRTC does not hold the interpreter's lock
        kernels = list(pool.map(one, ARCHITECTURES))
    eight_bits = any(len(kind) > 4 and kind[4] == 2 for kind in cases)
    for kernel in kernels:
        where = f"sm_{kernel.arch}, {kernel.registers} registers"
        # 8 bits: on sm_100 and sm_120 up to 14 words in a packet's 660 instructions. On an H200
        # (105 M, bf16) 32 warps with 22 of them took 0.538 ms, 24 with 2 0.529, 16 with none 0.552.
        few = eight_bits and kernel.local == 0 and kernel.stack <= 56
        assert few or kernel.stays_in_registers(), f"{where}: spills"
    return kernels


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {5}))  # writes a direction: below
@pytest.mark.parametrize("kept", KEPT)
def test_every_rule_in_every_dtype(rule, kept):
    """No spills, every fp32 stream in 128-bit accesses, both ways; 16-bit ones in 64."""
    for kernel in build((rule, *KEPT[kept])):
        states = STATES[rule]
        wide = states + {"fp32": 1, "fp16": 1, "bf16 split": 0}[kept]  # the master
        narrow = {"fp32": 0, "fp16": 1, "bf16 split": 2}[kept]
        grads = {"fp32": 1, "fp16": 0, "bf16 split": 0}[kept]
        assert kernel.count(r"LD\.E\.128.*") == wide + grads
        assert kernel.count(r"ST\.E\.128.*") == wide
        assert kernel.count(r"LD\.E\.64.*") == {"fp32": 0, "fp16": 2, "bf16 split": 3}[kept]
        assert kernel.count(r"ST\.E\.64.*") == narrow
        assert kernel.count(r"LDG\.E\.128\.CONSTANT.*") >= 3  # the scan, for every dtype
        assert kernel.occupancy() >= (0.33 if states > 2 else 0.5)


@pytest.mark.parametrize("kept", KEPT)
def test_an_average_is_one_more_stream(kept):
    plain, averaged = build((0, *KEPT[kept])), build((0, *KEPT[kept], 0, True))
    for without, kernel in zip(plain, averaged, strict=True):
        for access in (r"LD\.E\.128.*", r"ST\.E\.128.*"):
            assert kernel.count(access) == without.count(access) + 1
        assert kernel.occupancy() >= 0.33


@pytest.mark.parametrize("state", [0, 2])
def test_split_fp16_masters(state):
    for kernel in build((0, F16, F16, 2, state)):
        assert kernel.occupancy() >= 0.33


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("state", [1, 2], ids=["bf16", "8 bits"])
def test_narrow_states(kept, state):
    """Both states in one access of 64 bits, both ways: 4 elements in bf16, 8 of 8 bits."""
    before = build((0, *KEPT[kept]))
    for plain, kernel in zip(before, build((0, *KEPT[kept], state)), strict=True):
        if state == 2:
            reads, writes = {"fp32": (4, 2), "fp16": (4, 3), "bf16 split": (3, 2)}[kept]
            assert kernel.count(r"LD\.E\.128.*") == reads
            assert kernel.count(r"ST\.E\.128.*") == writes
            assert kernel.count(r"LD\.E\.64.*") >= 2
            assert kernel.count(r"ST\.E\.64.*") >= 2
        else:
            for access in (r"LD\.E\.128.*", r"ST\.E\.128.*"):
                assert kernel.count(access) == plain.count(access) - 2
            assert kernel.count(r"LD\.E\.64.*") == plain.count(r"LD\.E\.64.*") + 2
            assert kernel.count(r"ST\.E\.64.*") == plain.count(r"ST\.E\.64.*") + 2
        assert kernel.occupancy() >= 0.33


@pytest.mark.parametrize("grad", [F32, F16, BF16])
def test_muons_first_pass_writes_what_it_never_reads(grad):
    for kernel in build((5, BF16, grad, 3)):
        assert kernel.count(r"LD\.E\.128.*") == 1 + (grad == F32)
        assert kernel.count(r"ST\.E\.128.*") == 1
        assert kernel.count(r"LD\.E\.64.*") == (grad != F32)
        assert kernel.count(r"ST\.E\.64.*") == 1


@pytest.mark.parametrize(
    "cases",
    [
        [(0, *KEPT["fp16"]), (0, *KEPT["fp32"])],  # a converted network: its batch norms are fp32
        [(0, *KEPT["bf16 split"]), (0, *KEPT["fp32"])],
        [(0, F16, F32, 1), (0, BF16, F32, 2)],  # 32-bit gradients of 16-bit weights
        [(0, *kept) for kept in KEPT.values()],
        [(rule, *kept) for rule in sorted(RULES) for kept in KEPT.values()],
    ],
    ids=["fp16+fp32", "bf16+fp32", "fp32 gradients", "three dtypes", "everything"],
)
def test_several_cases_in_one_kernel(cases):
    for kernel in build(*cases):
        assert kernel.occupancy() >= 0.25
