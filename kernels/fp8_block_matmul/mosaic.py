"""float8 wgmma with sums promoted to float32 every 128 of K, where the scales change.

Blocks that stay on their SM go from tile to tile; one warpgroup has TMA fill the pipeline, two
compute. Each accumulates 128 of K in wgmma's registers, which keep about 14 bits, and adds them,
scaled, to sums of its own; while one does that, the other has the tensor cores. Blocks come in
pairs that share what they can: tiles of the same columns w, or, where there is one row of tiles, x.
Their half of it is copied to both.

Where tiles are few, K is split between blocks, and XLA adds their partial sums, in order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.fp8_block_matmul.blocks import BLOCK

SMS = 132  # of an H200
TILE = 128  # columns of a tile, and rows
FEW = 64  # rows that one wgmma has: the warpgroups then share a tile's columns
SCALES = 4  # scales of a row in a copy: 16 bytes, the least that TMA copies
STAGES = {2: 5, 4: 4}  # of the pipeline, by bytes of a result
# A row's scales are with the four threads that have its numbers in wgmma's layout.
ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((64, SCALES), (16, SCALES), (8, SCALES))),
    warp_dims=(-6,),
    lane_dims=(-2, plgpu.Replicated(4)),
    vector_dim=-1,
)
WIDE = 8  # pairs down before the next across: blocks at work at once share both x and w in L2


class Plan(NamedTuple):
    rows: int  # of a tile
    tiles: tuple[int, int]  # (m, n), in pairs
    pair: str | None  # "m" or "n": where the two tiles of a pair lie beside each other
    splits: int  # of K

    @property
    def apart(self) -> tuple[int, int]:
        """Tiles of a pair, in rows and in columns."""
        return 1 + (self.pair == "m"), 1 + (self.pair == "n")


def lacks(x, w, x_scale, w_scale) -> str | None:
    """Why these arguments are not for the kernel."""
    k, n = x.shape[1], w.shape[0]
    step = SCALES * BLOCK
    if k % step:
        return f"takes K in multiples of {step}, and K={k}"
    if n % TILE:
        return f"takes N in multiples of {TILE}, and N={n}"
    narrow = x_scale.dtype == w_scale.dtype == jnp.float32
    return None if narrow else "takes scales in float32"


def plan(m: int, n: int, k: int, sms: int = SMS) -> Plan:
    rows = FEW if m <= FEW else TILE
    down, across = -(-m // rows), -(-n // TILE)
    pair = "m" if down % 2 == 0 else "n" if across % 2 == 0 else None
    steps = k // BLOCK
    most = max(1, min(sms // (down * across), steps // 8))
    splits = next(s for s in range(most, 0, -1) if steps % s == 0)
    return Plan(rows, (down, across), pair, splits)


def fp8_block_matmul(x, w, x_scale, w_scale, *, out_dtype, interpret, sms: int = SMS):
    (rows, k), (n, _) = x.shape, w.shape
    m = -(-rows // 8) * 8  # a swizzle's rows: where they do not come in eights, x is copied
    x, x_scale = (jnp.pad(a, ((0, m - rows), (0, 0))) for a in (x, x_scale))
    way = plan(m, n, k, sms)
    partial = jnp.float32 if way.splits > 1 else out_dtype
    pair = 1 + (way.pair is not None)
    pairs = way.splits * way.tiles[0] * way.tiles[1] // pair
    found = plgpu.kernel(
        functools.partial(_tiles, way=way),
        out_type=jax.ShapeDtypeStruct((way.splits, m, n), partial),
        grid=(min(sms // pair, pairs),),
        grid_names=("pair",),
        cluster=(pair,),
        cluster_names=("half",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="fp8_block_matmul",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, w, x_scale, w_scale)
    found = found.sum(0).astype(out_dtype) if way.splits > 1 else found.reshape(m, n)
    return found[:rows]


def _tiles(x_g, w_g, x_scale_g, w_scale_g, out_g, *, way: Plan):
    """The tiles of a block, one after the other."""
    shape = (FEW, TILE if way.rows == TILE else TILE // 2)  # of a warpgroup's part
    steps = x_g.shape[1] // BLOCK // way.splits
    pipeline = functools.partial(_pipeline, way, steps, out_g.dtype)
    buffers = pipeline(0, _nothing, _nothing).get_allocations(x_g, w_g, x_scale_g)
    tiling = (8, 128 // jnp.dtype(out_g.dtype).itemsize)
    transforms = (plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

    @functools.partial(
        pl.run_scoped,
        buffers=buffers,
        out_s=plgpu.SMEM((2, *shape), out_g.dtype, transforms=transforms),
        collective_axes="warpgroup",
    )
    def _scope(buffers, out_s):
        warpgroup, half = lax.axis_index("warpgroup"), lax.axis_index("half")
        down, across = (t // a for t, a in zip(way.tiles, way.apart, strict=True))

        @plgpu.nd_loop((way.splits * down * across,), collective_axes="pair")
        def _tile(loop):
            (index,) = loop.index
            split, place = lax.div(index, down * across), lax.rem(index, down * across)
            m, n = plgpu.planar_snake(place, (down, across), 0, WIDE)
            m, n = (i * a + half * (a - 1) for i, a in zip((m, n), way.apart, strict=True))
            rows, columns = pl.ds(m * way.rows, way.rows), pl.ds(n * TILE, TILE)
            first = split * steps
            depth = pl.ds(first * BLOCK, steps * BLOCK)
            if way.rows == TILE:
                part = pl.ds(warpgroup * FEW, FEW), pl.ds(0, TILE)
            else:
                part = pl.ds(0, FEW), pl.ds(warpgroup * (TILE // 2), TILE // 2)

            def around(steps):
                total = steps(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s[warpgroup] = total.astype(out_g.dtype)
                plgpu.commit_smem()
                target = out_g.at[split, rows, columns].at[part]
                plgpu.copy_smem_to_gmem(out_s.at[warpgroup], target)

            step = functools.partial(_step, w_scale=w_scale_g.at[n], part=part, first=first)
            pipeline(first, step, around)(
                x_g.at[rows, depth], w_g.at[columns, depth], x_scale_g.at[rows], allocations=buffers
            )

    plgpu.wait_smem_to_gmem(0)


def _pipeline(way: Plan, steps: int, out_dtype, first, step, around):
    """What runs `step` over 128 of K at a time, inside of `around`."""
    tiling = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]

    def codes(rows, shared):
        return plgpu.BlockSpec(
            (rows, BLOCK),
            lambda step: (0, step),
            transforms=tiling,
            collective_axes=("half",) if shared else (),
        )

    scales = plgpu.BlockSpec((way.rows, SCALES), lambda step: (0, lax.div(first + step, SCALES)))
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=[codes(way.rows, way.pair == "n"), codes(TILE, way.pair == "m"), scales],
        max_concurrent_steps=min(STAGES[jnp.dtype(out_dtype).itemsize], steps),
        num_compute_wgs=2,
        memory_registers=40,
        wg_axis="warpgroup",
        compute_context=around,
    )


def _nothing(*_):
    """In place of what is computed, which buffers do not depend on."""


def _step(index, x_s, w_s, x_scale_s, total, *, w_scale, part, first):
    """128 of K, of a warpgroup's part of the tile. w's scale is one number: read from memory, as
    TMA would have it at addresses that are multiples of 128 bytes.
    """
    rows, columns = part
    block = first + index[0]
    at = lax.rem(block, SCALES)

    def product(acc):
        plgpu.wgmma(acc, x_s.at[rows], w_s.at[columns].T)
        # While the tensor cores are at it.
        scales = plgpu.load(x_scale_s.at[rows], layout=ROWS, optimized=False)
        which = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=ROWS)
        scale = jnp.sum(jnp.where(which == at, scales, 0.0), 1) * w_scale[block]
        # All of the warpgroup has read them before one thread of it gives the buffer back.
        plgpu.commit_smem()
        return acc[...] * lax.broadcast_in_dim(scale, total.shape, (0,))

    return total + pl.run_scoped(product, plgpu.ACC(total.shape, jnp.float32))
