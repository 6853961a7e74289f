"""All columns of a block in one launch, for Hopper GPUs.

Rows do not touch each other: a thread has one or two of them, and a warpgroup goes through their
columns alone. The rows' columns lie in shared memory, each the numbers of a column side by side,
and errors take the place of what they are the errors of; U's block lies there too. Eight columns at
a time are in registers: first the errors of all columns before come off them, then their own, one
by one.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.gptq_block.grids import Integers

SMS = 132  # of an H200
THREADS = 128
TOGETHER = 8  # columns in registers
MOST = 128  # columns: U's block and 256 rows of them fill shared memory


def lacks(w, grid, keep) -> str | None:
    *_, c, r = w.shape
    if keep is not None:
        return "takes blocks of which all numbers stay, and keep is given"
    if not isinstance(grid, Integers):
        return f"takes integer grids, and grid={grid}"
    if w.dtype != jnp.float32:
        return f"takes w in float32, and w.dtype={w.dtype}"
    if w.size == 0 or c % TOGETHER or c > MOST:
        return f"takes columns in multiples of {TOGETHER} up to {MOST}, and w.shape={w.shape}"
    if r % THREADS:
        return f"takes rows in multiples of {THREADS}, and w.shape={w.shape}"
    return None


def rows_of_a_thread(b: int, r: int) -> int:
    """Two read U half as often; one where that would leave SMs without any."""
    return 2 if r % (2 * THREADS) == 0 and b * r > SMS * THREADS else 1


def gptq_block(w, u, scale, zero, group, keep=None, *, grid, interpret=False):
    assert keep is None  # see `lacks`
    *batch, c, r = w.shape
    flat = [x.reshape(-1, *x.shape[len(batch) :]) for x in (w, u, scale, zero, group)]
    b = flat[0].shape[0]
    rows = THREADS * rows_of_a_thread(b, r)
    codes, error = plgpu.kernel(
        functools.partial(_body, grid=grid),
        out_type=(
            jax.ShapeDtypeStruct((b, c, r), jnp.uint8),
            jax.ShapeDtypeStruct((b, c, r), jnp.float32),
        ),
        grid=(r // rows, b),
        grid_names=("rows", "matrix"),
        scratch_types=dict(
            u_smem=plgpu.SMEM((c, c), jnp.float32),
            w_smem=plgpu.SMEM((c, rows), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=2),
        ),
        # A thread reads nothing that another has written, but for what TMA brought.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name="gptq_block",
    )(*flat)
    return codes.reshape(w.shape), error.reshape(w.shape)


def _body(w, u, scale, zero, group, codes, error, *, u_smem, w_smem, ready, grid):
    b = lax.axis_index("matrix")
    c, rows = w_smem.shape
    of = pl.ds(lax.axis_index("rows") * rows, rows)
    layout = plgpu.Layout.WG_STRIDED((rows,), vec_size=rows // THREADS)
    plgpu.copy_gmem_to_smem(u.at[b], u_smem, ready)
    plgpu.copy_gmem_to_smem(w.at[b, :, of], w_smem, ready)
    plgpu.barrier_wait(ready)

    @pl.loop(0, c // TOGETHER)
    def _(step):
        first = step * TOGETHER
        columns = range(TOGETHER)
        groups = [group[b, first + t] for t in columns]
        scales = [plgpu.load(scale.at[b, g, of], layout=layout) for g in groups]
        zeros = [plgpu.load(zero.at[b, g, of], layout=layout) for g in groups]

        def take_off(before, values):
            for k in columns:
                k += before * TOGETHER
                e = plgpu.load(w_smem.at[k], layout=layout)
                values = [x - u_smem[k, first + t] * e for t, x in enumerate(values)]
            return values

        values = [plgpu.load(w_smem.at[first + t], layout=layout) for t in columns]
        values = lax.fori_loop(0, step, take_off, values)
        for t in columns:
            j = first + t
            points = grid.points(values[t], scales[t], zeros[t])
            e = (values[t] - grid.decode(points, scales[t], zeros[t])) / u_smem[j, j]
            codes.at[b, j, of][...] = points.astype(jnp.uint8)
            w_smem.at[j][...] = e
            for later in range(t + 1, TOGETHER):
                values[later] = values[later] - u_smem[j, first + later] * e

    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(w_smem, error.at[b, :, of])
    plgpu.wait_smem_to_gmem(0)
