"""One pass over memory: a warpgroup has a row, or a few short ones, in registers.

Small blocks of one warpgroup each, several on an SM, go through the rows with TMA copies ahead. The
sum takes the place of x in shared memory and leaves from there, so a buffer is filled again one
step after its own, once the stores have read it.

Without rotation a row is spread over the warpgroup's threads in memory's order, and its sums and
maxima are of all threads. With rotation the row's blocks are the rows of a wgmma whose other
operand is the ±1 matrix of order 64; larger orders are sums and differences of its results,
H₂ₙ = [[Hₙ, Hₙ], [Hₙ, -Hₙ]]. A tile is 64 blocks or a few times that, of several rows where rows are
short. A normed row is the sum of two bfloat16 numbers to 2^-17, and takes two products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.quantize_rows.rotation import signs
from kernels.quantize_rows.rounding import LARGEST, SMALLEST, STORED
from kernels.quantize_rows.tiles import MMA, Plan, plan

SMS = 132  # of an H200
OF_BLOCKS = plgpu.Layout.WGMMA.reduce(1)  # one number for each row of wgmma
# 1.5 · 2^23: a number added to it is rounded to an integer in its low bits, ties to even.
MAGIC = 12582912.0


def quantize_rows(
    x, residual, rms_weight, *, rms_epsilon, hadamard, dtype, interpret, sms: int = SMS
):
    m, k = x.shape
    way = plan(k, hadamard, residual=residual is not None, normed=rms_weight is not None)
    flat = (m * way.blocks, way.width)
    arrays = {"x": x.reshape(flat)}
    results = {
        "codes": jax.ShapeDtypeStruct(flat, STORED[dtype]),
        "scale": jax.ShapeDtypeStruct((m,), jnp.float32),
    }
    if residual is not None:
        arrays["residual"] = residual.reshape(flat)
        results["total"] = jax.ShapeDtypeStruct(flat, x.dtype)
    if rms_weight is not None:
        weight = jnp.tile(rms_weight.reshape(way.blocks, way.width), (way.rows, 1))
        arrays["weight"] = jnp.pad(weight, ((0, way.held - way.copied), (0, 0)))
    if hadamard:
        arrays["h"] = signs(MMA, x.dtype)
    ctas = min(-(-m // way.rows), sms * way.per_sm)
    names = (*arrays, *results)

    def body(*refs, **scratch):
        _go_through(dict(zip(names, refs, strict=True)), scratch, way, m, ctas, step)

    step = functools.partial(
        _rotated if hadamard else _plain, way=way, k=k, epsilon=rms_epsilon, dtype=dtype, m=m
    )
    found = plgpu.kernel(
        body,
        out_type=tuple(results.values()),
        scratch_types=_scratch(way, arrays, STORED[dtype], bool(hadamard)),
        grid=(ctas,),
        grid_names=("cta",),
        kernel_name="quantize_rows",
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*arrays.values())
    codes, scale, *total = found
    return codes.reshape(m, k), scale.reshape(m, 1), total[0].reshape(m, k) if total else None


def _scratch(way: Plan, arrays, stored, swizzled: bool) -> dict[str, Any]:
    def smem(shape, dtype):
        swizzle = MMA * jnp.dtype(dtype).itemsize  # parts of 64 columns are read and written
        transforms = (plgpu.TilingTransform((8, MMA)), plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
        return plgpu.SMEM(shape, dtype, transforms=transforms if swizzled else ())

    tile = (way.held, way.width)
    copied = [name for name in ("x", "residual") if name in arrays]
    once = ["h"] if "h" in arrays else ["weight"] if "weight" in arrays else []
    scratch = {
        **{f"{name}_s": smem((way.stages, *tile), arrays[name].dtype) for name in copied},
        **{f"{name}_s": smem(arrays[name].shape, arrays[name].dtype) for name in once},
        "codes_s": smem(tile, stored),
        "loaded": plgpu.Barrier(num_arrivals=len(copied), num_barriers=way.stages),
    }
    if once:
        scratch["loaded_once"] = plgpu.Barrier()
    if "weight" in arrays and "h" in arrays:
        scratch["low_s"] = smem(tile, jnp.bfloat16)
        if "residual" not in arrays:
            scratch["high_s"] = smem(tile, jnp.bfloat16)
    return scratch


def _go_through(g, s, way: Plan, m: int, ctas: int, compute):
    """The block's rows, one step after the other, copies ahead."""
    cta = lax.axis_index("cta")
    steps = lax.div(-(-m // way.rows) - cta + ctas - 1, ctas)

    def at(step):
        return pl.ds((cta + step * ctas) * way.copied, way.copied)

    def fetch(step):
        slot = lax.rem(step, way.stages)
        for name in ("x", "residual"):
            if name in g:
                target = s[f"{name}_s"].at[slot, pl.ds(0, way.copied)]
                plgpu.copy_gmem_to_smem(g[name].at[at(step)], target, s["loaded"].at[slot])

    if "loaded_once" in s:
        once = "h" if "h" in g else "weight"
        plgpu.copy_gmem_to_smem(g[once], s[f"{once}_s"], s["loaded_once"])
    for step in range(way.stages):
        pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))
    if "loaded_once" in s:
        plgpu.barrier_wait(s["loaded_once"])

    @pl.loop(0, steps)
    def _step(step):
        slot = lax.rem(step, way.stages)
        plgpu.barrier_wait(s["loaded"].at[slot])

        def before_stores():
            """What the last step stored is on its way, and its buffer can be filled again."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ahead = step - 1 + way.stages
            pl.when((step > 0) & (ahead < steps))(lambda: fetch(ahead))

        compute(g, s, slot, (cta + step * ctas) * way.rows, before_stores)
        plgpu.commit_smem()
        source = pl.ds(0, way.copied)
        plgpu.copy_smem_to_gmem(s["codes_s"].at[source], g["codes"].at[at(step)])
        if "total" in g:
            plgpu.copy_smem_to_gmem(s["x_s"].at[slot, source], g["total"].at[at(step)])

    plgpu.wait_smem_to_gmem(0)


def _plain(g, s, slot, row, before_stores, *, way: Plan, k: int, epsilon, dtype, m):
    """One row, in memory's order over the threads."""
    del m
    vector = 8 if k % 1024 == 0 else 4
    layout = plgpu.Layout.WG_STRIDED((way.blocks, way.width), vec_size=vector)
    total = plgpu.load(s["x_s"].at[slot], layout=layout)
    if "residual" in g:
        total = _sum(total, plgpu.load(s["residual_s"].at[slot], layout=layout))
    y = total.astype(jnp.float32)
    norm: Any = 1.0
    if "weight" in g:
        norm = lax.rsqrt(jnp.sum(y * y) / k + epsilon)
        y = y * plgpu.load(s["weight_s"], layout=layout).astype(jnp.float32)
    scale, factor, finite = _scale(_float(jnp.max(_bits(y))), norm, dtype)
    g["scale"][row] = scale
    before_stores()
    if "residual" in g:
        s["x_s"][slot] = total

    @pl.when(finite)
    def _():
        s["codes_s"][...] = _round(y * factor, dtype)

    @pl.when(jnp.logical_not(finite))
    def _():
        s["codes_s"][...] = plgpu.layout_cast(jnp.zeros(y.shape, STORED[dtype]), layout)


def _rotated(g, s, slot, row, before_stores, *, way: Plan, k: int, epsilon, dtype, m):
    """A few rows, their blocks as the rows of wgmma."""
    columns = [slice(n, n + MMA) for n in range(0, way.width, MMA)]
    operands = [s["x_s"].at[slot]]
    norms: list[Any] = [1.0] * way.rows
    if "residual" in g or "weight" in g:
        squares = [_add_residual(g, s, slot, part) for part in columns]
        if "weight" in g:
            of_rows = _of_rows(sum(squares), jnp.sum, way)
            norms = [lax.rsqrt(square / k + epsilon) for square in of_rows]
            operands = [
                s["residual_s"].at[slot] if "residual" in g else s["high_s"],
                s["low_s"],
            ]
            for part in columns:
                _weigh(g, s["x_s"].at[slot], operands, part)
        plgpu.commit_smem()
    parts = _rotate(operands, s["h_s"], way)
    tops = functools.reduce(jnp.maximum, [jnp.max(_bits(part), 1) for part in parts])
    found = [
        _scale(_float(large), norm * way.width**-0.5, dtype)
        for large, norm in zip(_of_rows(tops, jnp.max, way), norms, strict=True)
    ]
    for n, (scale, _, _) in enumerate(found):

        @pl.when(row + n < m)
        def _(n=n, scale=scale):
            g["scale"][row + n] = scale

    factors = _over_blocks([jnp.where(finite, factor, 0) for _, factor, finite in found], way)
    before_stores()
    for part, y in zip(columns, parts, strict=True):
        y = y * factors
        y = jnp.where(y == y, y, 0.0)  # 0 · inf and 0 · NaN
        # LLVM would take the choice behind the rounding: 252 registers for 159.
        y = lax.optimization_barrier(y)
        s["codes_s"][:, part] = _round(y, dtype)


def _add_residual(g, s, slot, part):
    """x becomes the sum, in shared memory; the squares of each block's numbers."""
    x_s = s["x_s"].at[slot, :, part]
    total = plgpu.load(x_s, layout=plgpu.Layout.WGMMA)
    if "residual" in g:
        residual = plgpu.load(s["residual_s"].at[slot, :, part], layout=plgpu.Layout.WGMMA)
        total = _sum(total, residual)
        x_s[...] = total
    y = total.astype(jnp.float32)
    return jnp.sum(y * y, 1)


def _weigh(g, total_s, operands, part):
    """The sum times the weight of the norm, in two numbers of bfloat16."""
    y = plgpu.load(total_s.at[:, part], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    # From global memory, which a tile reads once: shared memory is better used.
    weight = plgpu.load(g["weight"].at[:, part], layout=plgpu.Layout.WGMMA, optimized=False)
    y = y * weight.astype(jnp.float32)
    high = y.astype(jnp.bfloat16)
    operands[0][:, part] = high
    operands[1][:, part] = (y - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _rotate(operands, h_s, way: Plan) -> list:
    """The operands' sum times the ±1 matrix, in parts of 64 columns."""

    def products(*parts):
        for n, acc in enumerate(parts):
            for operand in operands:
                plgpu.wgmma(acc, operand.at[:, n * MMA : (n + 1) * MMA], h_s)
        return [acc[...] for acc in parts]

    accumulators = [plgpu.ACC((way.held, MMA), jnp.float32)] * (way.width // MMA)
    parts = pl.run_scoped(products, *accumulators)
    for apart in (2**n for n in range((len(parts) - 1).bit_length())):
        parts = [
            parts[n - apart] - part if n & apart else part + parts[n + apart]
            for n, part in enumerate(parts)
        ]
    return parts


def _sum(x, residual):
    return (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)


def _bits(y):
    """Of magnitudes, whose order they have, with NaN above infinity: see `rounding.largest`."""
    return lax.bitcast_convert_type(jnp.abs(y), jnp.int32)


def _float(bits):
    # Of a vector, because Mosaic has no such cast of scalars.
    return lax.bitcast_convert_type(bits.reshape(1), jnp.float32)[0]


def _scale(largest, norm, dtype):
    """A row's scale, what its numbers are multiplied by, and whether both are numbers."""
    scale = jnp.maximum(largest * norm / LARGEST[dtype], SMALLEST)
    return scale, norm * (1 / scale), scale < jnp.inf  # not of NaN


def _round(y, dtype):
    if dtype == "fp8":
        return y.astype(STORED[dtype])
    return lax.bitcast_convert_type(y + MAGIC, jnp.int32).astype(jnp.int8)


def _row_numbers(way: Plan):
    """Of each block in a tile, its row."""
    blocks = plgpu.broadcasted_iota(jnp.int32, (way.held,), 0, layout=OF_BLOCKS)
    return lax.div(blocks, jnp.int32(way.blocks))


def _of_rows(of_blocks, reduce, way: Plan) -> list:
    """Each row's value of its blocks'. Both reductions have 0 for what is not there."""
    if way.held == way.blocks:
        return [reduce(plgpu.layout_cast(of_blocks, OF_BLOCKS))]
    rows = _row_numbers(way)
    return [
        reduce(jnp.where(rows == n, of_blocks, jnp.zeros_like(of_blocks))) for n in range(way.rows)
    ]


def _over_blocks(of_rows: list, way: Plan):
    """Each block's row's value, for all of a part's columns."""
    if way.rows == 1:
        return of_rows[0]
    rows = _row_numbers(way)
    values = jnp.full((way.held,), of_rows[0], jnp.float32)
    for n, value in enumerate(of_rows[1:], 1):
        values = jnp.where(rows == n, value, values)
    return lax.broadcast_in_dim(values, (way.held, MMA), (0,))
