"""Tiles on and above the diagonal, each written on both of its sides, for Hopper GPUs.

A block of the grid takes tiles of 256 rows and 128 columns one after another. Two warpgroups
multiply, 128 rows each, straight from x as it lies in memory: wgmma reads 16-bit operands of shared
memory in either major. A third keeps TMA copies of x's rows coming.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

SMS = 132  # of an H200
ROWS, COLUMNS = 256, 128  # of a tile; a warpgroup's half of it is square
STEP = 64  # rows of x per step
STAGES = 4
BAND = 4  # bands of tiles walked side by side, so that what they share stays in L2
CHUNK = (64, 32)  # of a warpgroup's half, on its way out


def gram(x, *, interpret=False):
    n, i = x.shape
    return plgpu.kernel(
        _body,
        out_type=jax.ShapeDtypeStruct((i, i), jnp.float32),
        grid=(min(SMS, 2 * _bands(i) * (2 * _bands(i) + 1)),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        scratch_types=dict(
            chunk=plgpu.SMEM((2, *CHUNK), jnp.float32, transforms=_tiled(32)),
            flipped=plgpu.SMEM((2, *reversed(CHUNK)), jnp.float32, transforms=_tiled(32)),
        ),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="gram",
    )(x)


def _bands(i: int) -> int:
    """Pairs of bands of 256 rows, the last perhaps beyond the matrix."""
    return -(-i // (2 * ROWS))


def _tiled(columns: int):
    return (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]


def _body(x, out, chunk, flipped):
    n, i = x.shape
    pairs = _bands(i)
    wg = lax.axis_index("wg")
    pipeline = functools.partial(
        plgpu.emit_pipeline_warp_specialized,
        grid=(-(-n // STEP),),
        memory_registers=40,
        in_specs=[
            plgpu.BlockSpec((STEP, width), lambda k: (k, 0), transforms=_tiled(64), delay_release=1)
            for width in (ROWS, COLUMNS)
        ],
        wg_axis="wg",
        num_compute_wgs=2,
        max_concurrent_steps=STAGES,
    )

    def multiply(_, left, right, acc):
        plgpu.wgmma(acc, left.at[:, pl.ds(wg * COLUMNS, COLUMNS)].transpose((1, 0)), right)
        plgpu.wgmma_wait(1)
        return acc

    def ignore(*_, **__):
        pass

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(ignore, compute_context=ignore).get_allocations(x, x),
        collective_axes="wg",
    )
    def _(allocations):
        @plgpu.nd_loop((pairs * (4 * pairs + 2),), collective_axes="sm")
        def _(step):
            a, b = _tile(step.index[0], pairs)

            @pl.when((a * ROWS < i) & (b * COLUMNS < i))
            def _():
                def compute(run):
                    @functools.partial(
                        pl.run_scoped, acc=plgpu.ACC((COLUMNS, COLUMNS), jnp.float32)
                    )
                    def _(acc):
                        run(acc)
                        row = a * ROWS + wg * COLUMNS
                        _write(acc[...], out, row, b * COLUMNS, chunk.at[wg], flipped.at[wg])

                left = x.at[:, pl.ds(a * ROWS, ROWS)]
                right = x.at[:, pl.ds(b * COLUMNS, COLUMNS)]
                pipeline(multiply, compute_context=compute)(left, right, allocations=allocations)

    plgpu.wait_smem_to_gmem(0)


def _tile(index, pairs: int):
    """(a, b) of a tile with b ≥ 2a: band a of 256 rows has 4·pairs - 2a tiles, so that a band and
    the one as far from the end fill a row of a rectangle of 4·pairs + 2.
    """
    row, column = plgpu.planar_snake(index, (pairs, 4 * pairs + 2), 0, BAND)
    of_first = 4 * pairs - 2 * row
    first = column < of_first
    a = jnp.where(first, row, 2 * pairs - 1 - row)
    return a, 2 * a + jnp.where(first, column, column - of_first)


def _write(block, out, row, column, chunk, flipped):
    """A square block above the diagonal goes to both sides, one on it to one, one below to none."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @pl.when(row < column)
    def _():
        for part, to in _parts(block, row, column):
            # Each waits for the copy before the last, which is the last of its buffer.
            _send(part, chunk, chunk, out.at[to], waiting=1)
            turned = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            _send(turned, flipped.transpose((1, 0)), flipped, out.at[to[::-1]], waiting=1)

    @pl.when(row == column)
    def _():
        for part, to in _parts(block, row, column):
            _send(part, chunk, chunk, out.at[to], waiting=0)


def _parts(block, row, column):
    height, width = CHUNK
    for r in range(0, COLUMNS, height):
        for c in range(0, COLUMNS, width):
            to = (pl.ds(row + r, height), pl.ds(column + c, width))
            yield block[r : r + height, c : c + width], to


def _send(part, into, buffer, to, *, waiting: int):
    plgpu.wait_smem_to_gmem(waiting, wait_read_only=True)
    into[...] = part
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, to)
