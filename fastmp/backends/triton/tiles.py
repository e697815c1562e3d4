"""Every tile choice of the Triton kernels, as plain data with the reason for it.

Nothing is tuned at run time: an autotuner times a dozen variants of each kernel at the first call
of every shape, and picks another one on a busy machine.
"""

from __future__ import annotations

from typing import NamedTuple


class LossTile(NamedTuple):
    """How one program of the loss kernel takes rows of logits."""

    rows: int  # at a time: one, or one for each thread
    block: int  # logits of a row at a time, a power of 2
    warps: int
    programs: int  # on each multiprocessor
    on_chip: bool  # the whole row is one block and stays in registers
    max_registers: int | None = None  # of a thread; None: the compiler's choice


# NVIDIA H200, 2026-11-27, torch 2.11, Triton 3.6, device time of forward and backward in us, with a
# pair and smoothing; % of a copy. A thread holds 32 logits: rows on a multiprocessor, registers.
#
#                           24, 80   24, 80, next row loaded   28, 72   32, 64   40, 48 (16 logits)
#   131072 x 1000   bf16     169          154  79%              162      161      193
#   65536 x 4096    bf16     295          288  88%              295      299      370
#   16384 x 1000    bf16      30           28                    30       31       34
#   131072 x 1000   fp16     168           -                    161      157       -
#
# 65,536 registers are 24 warps of 80. Rows of up to 256 classes need no more than 64 registers:
# 131072 x 100 takes 74 us with 32 of them and the next row, 76 without it, 85 with 24.
_LOGITS_A_WARP = 1024
_LONGEST_ROW_ON_CHIP = 16384
_WARPS_OF_A_SM, _REGISTERS = 24, 80
# ptxas spills with 80 for sm_100, and for sm_90 in fp32 where rows have edges. Not measured.
_WARPS_ELSEWHERE, _REGISTERS_ELSEWHERE = 16, 128
_FEW_CLASSES = 256
_WARPS_OF_FEW_CLASSES, _REGISTERS_OF_FEW_CLASSES = 32, 64
# A thread for each row. 131072 x 10 takes 16.8 us in programs of 8 warps, 18.4 of 4, 18.5 of 1; 73
# where a warp takes a row.
_LONGEST_ROW_OF_A_THREAD = 32
_WARPS_OF_SHORT_ROWS, _PROGRAMS_OF_SHORT_ROWS = 8, 2
# A longer row comes twice, in blocks of 16 logits a thread of a program of its own. A plain kernel
# of that form took 411 us for 8,192 x 32,000 in bf16 on an H200, where blocks of 8 KB with a
# maximum of the row for each took 585.
_LONG_ROW_BLOCK = 2048
_ONE_FOR_EACH_ROW = 1 << 20


def loss_tile(classes: int, architecture: int = 90, itemsize: int = 2) -> LossTile:
    """The tile for rows of so many classes, of so many bytes each."""
    if classes > _LONGEST_ROW_ON_CHIP:
        return LossTile(1, _LONG_ROW_BLOCK, 4, _ONE_FOR_EACH_ROW, on_chip=False)
    if classes <= _LONGEST_ROW_OF_A_THREAD:
        warps = _WARPS_OF_SHORT_ROWS
        return LossTile(32 * warps, classes, warps, _PROGRAMS_OF_SHORT_ROWS, on_chip=True)
    block = 1 << (classes - 1).bit_length()
    if block <= _FEW_CLASSES:
        return LossTile(1, block, 1, _WARPS_OF_FEW_CLASSES, True, _REGISTERS_OF_FEW_CLASSES)
    warps = max(block // _LOGITS_A_WARP, 1)
    if architecture == 90 and itemsize == 2:
        return LossTile(1, block, warps, _WARPS_OF_A_SM // warps, True, _REGISTERS)
    return LossTile(1, block, warps, max(_WARPS_ELSEWHERE // warps, 1), True, _REGISTERS_ELSEWHERE)


class LinearTile(NamedTuple):
    """The tile of one program of the linear kernels, y = x Wᵀ with x (M, K) and W (N, K)."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int  # of operands on their way to shared memory
    programs_per_sm: int  # that fit on a multiprocessor
    tma: bool  # whether the tensor memory accelerator moves the tiles


class _LinearTiles(NamedTuple):
    small_m: LinearTile
    short_k: LinearTile
    long_k: LinearTile


#: 16 bytes of a 16-bit dtype.
VECTOR = 8
# Up to 64 rows the weights are nearly all the traffic, and the product waits for them: small tiles,
# so that more multiprocessors take part, and many bytes on their way to each.
_SMALL_M = 64
# Up to this K the epilogue is a large part of a tile's time. It takes about 12 instructions for
# each element, 1,600 cycles for 128x128 on the 128 lanes of a multiprocessor; the tensor cores of
# sm_90 take 4 cycles there for each step of K, 8,192 for 2,048 steps. Two programs on each
# multiprocessor hide one's epilogue behind the other's product; 8 warps instead of 4 gained 4 to
# 10% on an H200 (2026-11-26). A tile twice as wide reads a quarter less from L2, 48 KB in 1,024
# cycles instead of 32 in 512, but there is room for one only: better from K = 4,096 on.
_SHORT_K = 2048

# Threads copy where tensor cores take their operands from registers. Two programs of 128x128 with
# three steps of 32 on their way, 48 KB each, fit into 164 KB of sm_80 and into the 100 KB of sm_86,
# sm_89 and sm_120; the last has TMA, but with its buffers for results only one would fit. With few
# rows 8 warps, because ptxas for sm_120 gives 4 of them no more than 80 registers, and spills.
_COPYING_THREADS = _LinearTiles(
    small_m=LinearTile(64, 64, 64, warps=8, stages=4, programs_per_sm=2, tma=False),
    short_k=LinearTile(128, 128, 32, warps=4, stages=4, programs_per_sm=2, tma=False),
    long_k=LinearTile(128, 128, 32, warps=4, stages=4, programs_per_sm=2, tma=False),
)
# By the first architecture that they are for.
_LINEAR_TILES = {
    80: _COPYING_THREADS,
    90: _LinearTiles(
        small_m=LinearTile(64, 64, 128, warps=4, stages=3, programs_per_sm=2, tma=True),
        short_k=LinearTile(128, 128, 64, warps=8, stages=3, programs_per_sm=2, tma=True),
        long_k=LinearTile(128, 256, 64, warps=8, stages=4, programs_per_sm=1, tma=True),
    ),
    # Triton before 3.9 keeps y and z apart in shared memory here: one stage less. A product of 64
    # rows would spill; half of 128 rows are none, and cost the tensor cores, not the memory.
    100: _LinearTiles(
        small_m=LinearTile(128, 64, 64, warps=4, stages=4, programs_per_sm=2, tma=True),
        short_k=LinearTile(128, 128, 64, warps=4, stages=2, programs_per_sm=2, tma=True),
        long_k=LinearTile(128, 256, 64, warps=8, stages=3, programs_per_sm=1, tma=True),
    ),
    120: _COPYING_THREADS,
}

# Rows of tiles in a group of the grouped ordering: 8 of 128 rows by 16 of 128 columns are what 132
# multiprocessors work on at a time, 24 blocks of operands for 128 tiles.
GROUP_M = 8


def linear_tile(m: int, k: int, architecture: int) -> LinearTile:
    """The tile for x (M, K)."""
    tiles = _LINEAR_TILES[max(known for known in _LINEAR_TILES if known <= architecture)]
    if m <= _SMALL_M:
        return tiles.small_m
    return tiles.short_k if k <= _SHORT_K else tiles.long_k


# Up to which K the fused product is taken: it was measured faster than torch's product and a pass
# there, and no faster from 4,096 on; between, nothing was measured. NVIDIA H200, 2026-11-26, torch
# 2.11, Triton 3.6, forward in bf16 with bias, gelu and z, us, by a prototype of the kernel with the
# tile of short_k and this formula of gelu:
#
#   M, K, N                 fused   product + pass   (product alone)
#   65536,  384, 1536        216         267             138
#   16384,  512, 2048         89         106              58
#   25216,  768, 3072        237         278             177
#   16384, 1024, 4096        251         278             192
#
# Other architectures were not measured.
MAX_FUSED_K = {
    "none": 0,
    "relu": _SHORT_K,
    "gelu": _SHORT_K,
    "gelu_tanh": _SHORT_K,
    "silu": _SHORT_K,
}


class ActivationTile(NamedTuple):
    """The tile of one program of the activation gradient, for matrices (M, N)."""

    block_m: int
    block_n: int
    split_m: int  # rows of a program, a multiple of block_m
    warps: int


# 16 programs for each multiprocessor, on which 4 or 5 fit: the last ones to finish are 1/16.
_PROGRAMS_PER_SM = 16
# With more splits adding their sums would be the longer part where the columns are few.
_MAX_SPLITS = 512
# block_m, block_n and warps of the kernel that adds them: 512 splits are 4 loads in a row.
SUM_SPLITS_TILE = (128, 32, 8)


# 16-bit elements of a tile, 32 for each thread. Fewer in fp32, which is as many bytes, and where
# each is a load of its own with an address of its own.
_ELEMENTS = 4096


def activation_tile(m: int, n: int, vector: int, sms: int) -> ActivationTile:
    """The tile for matrices (M, N), ``vector`` elements a load, on so many multiprocessors."""
    block_n = min(128, max(16, 1 << (n - 1).bit_length()))
    block_m = (_ELEMENTS if vector == 8 else _ELEMENTS // 2) // block_n
    programs = -(-_PROGRAMS_PER_SM * sms * block_n // n)
    splits = min(programs, _MAX_SPLITS, -(-m // block_m))
    return ActivationTile(block_m, block_n, -(-m // splits // block_m) * block_m, warps=4)


class MixTile(NamedTuple):
    """The tile of one program of mix."""

    ranges: int  # contiguous ranges, each of one plane
    block: int  # elements of a range, a power of 2
    warps: int


# Four warps with 8 to 16 programs on a multiprocessor have 32 KB in flight or more for each image
# that is read, which covers the latency (4.8 TB/s · 0.8 us / 132 = 29 KB). 32 elements spread the
# loads and divisions of a range, some 40 instructions of each thread; of fp32, 16 fill the
# registers as much.
_MIX_WARPS = 4
_MIX_ELEMENTS = {1: 32, 2: 32, 4: 16}
# Each access has an address and, with a box, a position in the image: 32 are 167 registers.
_MIX_ACCESSES = 8
# Ranges below a quarter of a program's lanes cost more in loads and divisions than idle lanes.
_MIX_SHORTEST = 128


def mix_tile(plane: int, itemsize: int, vector: int) -> MixTile:
    """The tile for planes of so many elements; shorter ranges until 3 of 4 lanes have work."""
    tile = _MIX_WARPS * 32 * min(_MIX_ELEMENTS[itemsize], _MIX_ACCESSES * vector)
    block = min(tile, 1 << (plane - 1).bit_length())
    while block > _MIX_SHORTEST and 3 * -(-plane // block) * block > 4 * plane:
        block //= 2
    return MixTile(tile // block, block, _MIX_WARPS)


class ProductTile(NamedTuple):
    """The tile of one program of the products of a Newton-Schulz iteration."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    max_registers: int | None = None  # of a thread; None: the compiler's choice


# Large tiles, two programs a multiprocessor, where there are enough of them; else small ones, so
# that more multiprocessors take part. All products of a step on an H200 (2026-11-27), ms, with this
# rule, only large, only small tiles: ViT-B 1.83, 1.84, 2.58; ViT-S 0.45, 0.47, 0.53; ResNet-18
# 0.21, 0.26, 0.24. Large ones of 4 warps: 1.85, 0.48, 0.27; with 4 stages, one program, 1.99, 0.50,
# 0.25.
# On sm_80 the large one has a program alone: two would spill. Its warps, and those of sm_100 and
# sm_120, are what compiles without spills; no time was measured there.
_PRODUCT_TILES = {
    80: (ProductTile(128, 128, 32, 8, 4), ProductTile(64, 64, 64, 4, 3)),
    90: (ProductTile(128, 128, 64, 8, 3, 128), ProductTile(64, 64, 64, 4, 4)),
    100: (ProductTile(128, 128, 64, 4, 3), ProductTile(64, 64, 64, 4, 4)),
    120: (ProductTile(128, 128, 32, 4, 3), ProductTile(64, 64, 64, 4, 3)),
}


def product_tile(
    sizes: list[list[int]], symmetric: bool, sms: int, architecture: int
) -> ProductTile:
    """The tile for results of these sizes (M, N), of symmetric ones half.

    Large from one tile a multiprocessor on; of symmetric products, which need more than half of
    these tiles, from two.
    """
    large, small = _PRODUCT_TILES[max(known for known in _PRODUCT_TILES if known <= architecture)]
    tiles = sum(-(-m // large.block_m) * -(-n // large.block_n) for m, n in sizes)
    return small if tiles < (2 if symmetric else 1) * sms else large
