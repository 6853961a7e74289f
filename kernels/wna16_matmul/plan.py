"""Which shapes the kernel takes, and how it divides them."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels.wna16_matmul import codes
from kernels.wna16_matmul.registers import ROWS, Order

SMS = 132  # of an H200
WARPGROUPS = 2  # that multiply; one more loads
TILE = ROWS * WARPGROUPS  # rows of W
MOST_ROWS = 128  # of x
BUFFERS = 200 * 1024  # bytes of shared memory
MOST_STAGES = 8
MOST_SPLITS = 8
BITS = (2, 3, 4, 8)


class Plan(NamedTuple):
    kind: str
    order: Order
    groups: int  # columns of W that share a scale
    columns: int  # of W in a tile
    block: int  # of them that are multiplied before they are scaled
    splits: int
    stages: int

    @property
    def words(self) -> int:
        """Of a row of a tile."""
        return self.columns * self.order.bits // 32

    @property
    def scaled_first(self) -> bool:
        return self.groups % self.block != 0


def lacks(x, scale, bits: int, kind: str) -> str | None:
    """Why the kernel cannot take these, in words that follow the operation's name."""
    (m, i), (o, groups) = x.shape, scale.shape
    size = i // groups
    if x.dtype != jnp.bfloat16:
        return f"takes x in bfloat16, and x.dtype={x.dtype}"
    if not 0 < m <= MOST_ROWS:
        return f"is for 1 to {MOST_ROWS} rows of x, and there are {m}"
    if bits not in BITS:
        return f"takes bits of 2, 3, 4 or 8, and bits={bits}"
    if scale.dtype.itemsize > 4:
        return f"takes scales of at most 32 bits, and scale.dtype={scale.dtype}"
    if o % TILE:
        return f"takes W's rows in multiples of {TILE}, and there are {o}"
    order = codes.order(kind, bits)
    if i % (least := _narrow(order)):
        return f"takes {bits}-bit columns in multiples of {least}, and there are {i}"
    block = max(64, order.columns)
    if size % order.codes or (size % block and block % size):
        return (
            f"takes groups of {order.codes} to {block} columns that divide {block}, or its "
            f"multiples, and not of {size}"
        )
    return None


def _narrow(order: Order) -> int:
    """Columns of the narrowest tile."""
    return 256 if order.bits == 3 else 512 // order.bits


def plan(m: int, i: int, o: int, groups: int, order: Order, kind: str) -> Plan:
    narrow = _narrow(order)
    wide = 2 * narrow
    # x's part of a tile should not be much more than W's, nor leave room for too few buffers.
    columns = wide if i % wide == 0 and m * wide * 2 <= TILE * 256 and order.bits != 3 else narrow
    block = min(columns, 64 if groups % 128 and groups % 64 == 0 and order.columns <= 64 else 128)
    used = TILE * columns * order.bits // 8 + m * columns * 2
    stages = min(MOST_STAGES, BUFFERS // used)
    return Plan(kind, order, groups, columns, block, _splits(o // TILE, i // columns), stages)


def _splits(tiles: int, steps: int) -> int:
    """Into how many parts columns are split: the slowest SM has the least to do, if to begin a tile
    and to end it takes as long as two steps.
    """

    def slowest(splits):
        return -(-tiles * splits // SMS) * (-(-steps // splits) + 2)

    return min(range(1, min(MOST_SPLITS, steps) + 1), key=slowest)
