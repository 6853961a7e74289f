"""How rows are cut for the kernel, and which rows it takes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WIDTH = 128  # of the blocks that a row is copied in where it is not rotated
MMA = 64  # rows of a wgmma, and the order of the matrix in it
ACCUMULATED = 64 * 256  # numbers that a warpgroup's registers accumulate: 128 a thread
LONGEST = 148 * WIDTH  # row that is not rotated, seen not to spill
SHARED = 226 * 1024  # bytes of shared memory for all blocks on an SM
MOST = 6  # warpgroups on an SM


class Plan(NamedTuple):
    """How rows go through the kernel. A row is `blocks` × `width`."""

    blocks: int
    width: int
    rows: int  # of a step
    held: int  # blocks of a step, with those that fill up wgmma's 64
    stages: int  # buffers: one in use, the others stored from and filled
    per_sm: int  # warpgroups on an SM

    @property
    def copied(self) -> int:
        """Blocks of a step that are copied."""
        return self.rows * self.blocks


def plan(k: int, hadamard: int, *, residual: bool, normed: bool) -> Plan:
    width = hadamard or WIDTH
    blocks = k // width
    rows, held = (_rows(blocks) or 1, _held(blocks)) if hadamard else (1, blocks)
    tile = held * width
    # bfloat16 numbers beside the stages': a normed row's second part, and its first where no
    # residual leaves room for it; or the weight.
    beside = MMA * MMA + tile * (normed + (normed and not residual)) if hadamard else tile * normed
    # What ptxas was seen to take, rounded up; a test holds it below what an SM has.
    numbers = tile // 128  # of a thread
    registers = (48 if hadamard else 40) + numbers + numbers // 2 * normed + 32 * bool(hadamard)
    registers = min(256, registers + (0 if hadamard else numbers // 4))

    def fitting(stages):
        shared = 2 * (stages * tile * (1 + residual) + beside) + tile + 2048
        return min(SHARED // shared, 512 // registers, MOST)

    stages = 3 if fitting(3) >= 4 or fitting(3) == fitting(2) else 2
    return Plan(blocks, width, rows, held, stages, fitting(stages))


def lacks(
    x: jax.Array, residual: jax.Array | None, rms_weight: jax.Array | None, hadamard: int
) -> str | None:
    """Why these arguments are not for the kernel."""
    k = x.shape[1]
    if x.dtype != jnp.bfloat16:
        return f"takes x in bfloat16, and x.dtype={x.dtype}"
    if rms_weight is not None and rms_weight.dtype != jnp.bfloat16:
        return f"takes rms_weight in bfloat16, and rms_weight.dtype={rms_weight.dtype}"
    if hadamard == 0 and k % 512:
        return f"takes K in multiples of 512, and K={k}"
    if hadamard and (_rows(k // hadamard) is None or _held(k // hadamard) * hadamard > ACCUMULATED):
        return f"has no tile of whole rows of K={k} in blocks of {hadamard}"
    if hadamard and x.size // hadamard % 8:
        return f"takes M · K / {hadamard} in multiples of 8, and M={x.shape[0]}, K={k}"
    way = plan(k, hadamard, residual=residual is not None, normed=rms_weight is not None)
    if not way.per_sm or (not hadamard and k > LONGEST):
        return f"takes shorter rows, and K={k}"
    return None


def _rows(blocks: int) -> int | None:
    """Rows of a tile whose blocks fill whole groups of 8, the swizzle's; None if none do."""
    most = max(MMA // blocks, 1)
    return next((rows for rows in range(most, 0, -1) if rows * blocks % 8 == 0), None)


def _held(blocks: int) -> int:
    return -(-(_rows(blocks) or 1) * blocks // MMA) * MMA
