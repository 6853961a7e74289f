"""Tiles of logits h wᵀ, one after another, in a Mosaic kernel for Hopper GPUs.

Two blocks form a cluster, which has 256 tokens: 128 a block, 64 for each of its two warpgroups
that multiply. A third warpgroup fetches. Both blocks need the same rows of w, so each fetches half
of them for both. The clusters share out items: 256 tokens by a range of the vocabulary, tile after
tile. Fetching runs ahead across tiles and items, so what is done with a tile does not stall it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

SMS = 132  # of an H200
CLUSTER = 2  # blocks; of more, Hopper's groups of 16 or 18 SMs would leave some idle
WARPGROUPS = 2  # that multiply
ROWS = 64  # tokens of a warpgroup
BLOCK = WARPGROUPS * ROWS
TOKENS = CLUSTER * BLOCK
# Registers of a thread: 168 for each of 384 when a block starts, and no more after. To ask for more
# than the others gave back is to wait for ever, which neither ptxas nor the interpreter sees.
FETCHING = 40
MULTIPLYING = 232
assert FETCHING + WARPGROUPS * MULTIPLYING <= 168 * (WARPGROUPS + 1)
STEP = 64  # of D: 128 bytes, the widest swizzle
ROW = plgpu.Layout.WGMMA.reduce(1)  # a value for each token, where a tile's rows are

PREFERRED_RANGES = 8  # 8 ranges by 8 groups of tokens at once: what they share fits the L2 cache


class Schedule(NamedTuple):
    """Who does what. An item is (group of tokens, range of the vocabulary)."""

    groups: int  # of TOKENS tokens
    tiles: int  # of `width` entries of the vocabulary
    ranges: int
    clusters: int
    width: int

    def at(self, item) -> tuple[Any, Any, Any, Any]:
        """Group, range, and its first and last tile + 1."""
        group, part = lax.div(item, self.ranges), lax.rem(item, self.ranges)
        first = lax.div(part * self.tiles, self.ranges)
        return group, part, first, lax.div((part + 1) * self.tiles, self.ranges)

    def count(self, cluster):
        """Items of a cluster: each takes every `clusters`-th."""
        return lax.div(self.groups * self.ranges - cluster + self.clusters - 1, self.clusters)


def schedule(tokens: int, vocabulary: int, width: int, sms: int) -> Schedule:
    groups, tiles = -(-tokens // TOKENS), -(-vocabulary // width)
    clusters = sms // CLUSTER

    def time(ranges):  # in tiles, of the cluster that has the most to do
        return -(-groups * ranges // clusters) * -(-tiles // ranges)

    candidates = range(1, min(tiles, clusters) + 1)
    least = min(map(time, candidates))
    good = [ranges for ranges in candidates if time(ranges) <= 1.03 * least]
    ranges = min(good, key=lambda ranges: abs(math.log(ranges / PREFERRED_RANGES)))
    return Schedule(groups, tiles, ranges, min(clusters, groups * ranges), width)


def swizzled(columns: int) -> tuple[Any, ...]:
    """How a 16-bit [rows, columns] lies in shared memory, for copies and products."""
    swizzle = plgpu.SwizzleTransform(2 * columns)  # type: ignore[abstract]
    return plgpu.TilingTransform((8, columns)), swizzle  # type: ignore[abstract]


def stages(width: int, reserved: int = 0) -> int:
    """Steps that fit in shared memory at once, beside `reserved` bytes of the caller's."""
    return (226 * 1024 - reserved) // ((BLOCK + width) * STEP * 2)


def kernel(name: str, body: Callable[..., None], plan: Schedule, out_type: Any, interpret: bool):
    """The grid that `each_tile` is for."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )


def each_tile(
    layers: Sequence[tuple[Any, Any]],
    plan: Schedule,
    begin: Callable[[Any], Any],
    use: Callable[..., Any],
    finish: Callable[..., None],
    *,
    stages: int,
    start: Any = 0,
) -> None:
    """Run by every warpgroup of a kernel; layers: (h, w) in global memory, one or more, whose
    logits of the same tokens and entries are used together.

    state = begin(row) where an item starts, its warpgroup's tokens being row, …, row + ROWS - 1;
    state = use(state, logits, row, column) for each of its tiles, whose first entry is `start` +
    column; finish(state, row, range) where it ends.
    """
    shared: dict[str, Any] = {
        "a": plgpu.SMEM((stages, BLOCK, STEP), layers[0][0].dtype, transforms=swizzled(STEP)),
        "b": plgpu.SMEM((stages, plan.width, STEP), layers[0][1].dtype, transforms=swizzled(STEP)),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        # Of both blocks: either one's fetching writes into both.
        "free": plgpu.ClusterBarrier(
            collective_axes=("block",), num_arrivals=WARPGROUPS, num_barriers=stages
        ),
    }
    depths = [-(-h.shape[1] // STEP) for h, _ in layers]  # what lies outside is read as zeros

    def scoped(a, b, full, free):
        warpgroup = lax.axis_index("warpgroup")
        cluster = lax.axis_index("cluster")
        block = lax.axis_index("block")

        def each_item(body, carry):
            def one(n, carry):
                group, part, first, last = plan.at(cluster + n * plan.clusters)
                return body(carry, group * TOKENS + block * BLOCK, part, first, last)

            return lax.fori_loop(0, plan.count(cluster), one, carry)

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(MULTIPLYING, action="increase")

            def tile_logits(step):
                def run(*accumulators):
                    now = step
                    for depth, acc in zip(depths, accumulators, strict=True):

                        def one(_, now, acc=acc):
                            slot = lax.rem(now, stages)
                            plgpu.barrier_wait(full.at[slot])
                            rows = pl.ds(pl.multiple_of(warpgroup * ROWS, ROWS), ROWS)
                            plgpu.wgmma(acc, a.at[slot, rows], b.at[slot].transpose((1, 0)))
                            plgpu.wgmma_wait(1)  # the step before is done: free what it read

                            @pl.when(now > step)
                            def _free():
                                plgpu.barrier_arrive(free.at[lax.rem(now - 1, stages)])

                            return now + 1

                        now = lax.fori_loop(0, depth, one, now)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(free.at[lax.rem(now - 1, stages)])
                    return [acc[...] for acc in accumulators]

                acc = plgpu.ACC((ROWS, plan.width), jnp.float32)
                return pl.run_scoped(run, *[acc] * len(layers))

            def item(step, row, part, first, last):
                row = row + warpgroup * ROWS

                def tile(n, carry):
                    step, state = carry
                    state = use(state, tile_logits(step), row, n * plan.width)
                    return step + sum(depths), state

                step, state = lax.fori_loop(first, last, tile, (step, begin(row)))
                finish(state, row, part)
                return step

            each_item(item, jnp.int32(0))

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(FETCHING, action="decrease")

            def item(step, row, part, first, last):
                def tile(n, step):
                    column = pl.multiple_of(start + n * plan.width, 8)
                    for depth, (h, w) in zip(depths, layers, strict=True):

                        def one(k, step, h=h, w=w):
                            slot = lax.rem(step, stages)

                            @pl.when(step >= stages)
                            def _wait():
                                plgpu.barrier_wait(free.at[slot])

                            at = pl.ds(k * STEP, STEP)
                            plgpu.copy_gmem_to_smem(
                                h.at[pl.ds(row, BLOCK), at], a.at[slot], full.at[slot]
                            )
                            plgpu.copy_gmem_to_smem(
                                w.at[pl.ds(column, plan.width), at], b.at[slot], full.at[slot],
                                collective_axes="block",
                            )  # fmt: skip
                            return step + 1

                        step = lax.fori_loop(0, depth, one, step)
                    return step

                return lax.fori_loop(first, last, tile, step)

            steps = each_item(item, jnp.int32(0))

            # A block that left would take its shared memory with it, which the other writes into.
            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _wait_for_all(step):
                plgpu.barrier_wait(free.at[lax.rem(step, stages)])

    pl.run_scoped(scoped, collective_axes="warpgroup", **shared)


def columns(shape: tuple[int, int], first):
    """The number of each entry of a tile, from `first` on."""
    return first + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)


def bounded(logits, column, vocabulary: int, outside: float, plan: Schedule):
    """Where a tile reaches beyond w, zeros were read: they are no logits."""
    if vocabulary % plan.width == 0:
        return logits
    return jnp.where(columns(logits.shape, column) < vocabulary, logits, outside)


def across(values, shape: tuple[int, int]):
    """A value for each token, at each entry of its row."""
    return lax.broadcast_in_dim(values, shape, (0,))


def constant(value: float) -> jax.Array:
    """A value for each token of a warpgroup."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)
