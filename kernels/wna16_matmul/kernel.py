"""The kernel: a ring of buffers that one warpgroup fills and two multiply from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.wna16_matmul import codes, registers
from kernels.wna16_matmul.plan import SMS, TILE, WARPGROUPS, Plan
from kernels.wna16_matmul.registers import ROWS


class Refs(NamedTuple):
    """In global memory, then in shared memory."""

    x: Any  # [m, i], its columns in the plan's order
    words: Any  # [o, w] of W
    scale: Any  # [o, g]
    zero: Any  # [o, g] or None
    out: Any  # [splits, m, o]
    x_tile: Any  # [stages, m, columns]
    w_tile: Any  # [stages, TILE, words]
    loaded: Any  # barriers [stages]
    consumed: Any
    operand: Any = None  # [WARPGROUPS, ROWS, block], when interpreted


def multiply(x, words, scale, zero, p: Plan, interpret: bool):
    """[splits, m, o] in float32: x Wᵀ of each part of the columns."""
    m, o, steps = x.shape[0], words.shape[0], x.shape[1] // p.columns
    units = o // TILE * p.splits

    def kernel(*refs):
        refs = Refs(*(refs if zero is not None else (*refs[:3], None, *refs[3:])))
        wg = lax.axis_index("wg")

        def for_each_unit(body):
            """body(unit, done): its steps come after `done` others of this SM."""

            @plgpu.nd_loop((units,), collective_axes="sm", init_carry=jnp.int32(0))
            def _(info, carry):
                unit = _unit(info.index[0], p.splits, steps)
                body(unit, carry)
                return carry + unit.end - unit.first

        @pl.when(wg == WARPGROUPS)
        def load():
            plgpu.set_max_registers(40, action="decrease")
            for_each_unit(lambda unit, done: _load(refs, unit, done, p))

        @pl.when(wg < WARPGROUPS)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            for_each_unit(lambda unit, done: _compute(refs, unit, done, wg, p, interpret))

    scratch = [
        _buffers((p.stages, m, p.columns), jnp.bfloat16),
        _buffers((p.stages, TILE, p.words), jnp.uint32, swizzled=p.order.words == 1),
        plgpu.Barrier(num_arrivals=2, num_barriers=p.stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=p.stages),
    ]
    if interpret:
        scratch.append(_buffers((WARPGROUPS, ROWS, p.block), jnp.bfloat16))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((p.splits, m, o), jnp.float32),
        scratch_types=scratch,
        grid=(min(SMS, units),),
        grid_names=("sm",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        # Registers are laid out by hand: there is no layout to infer.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(x, words, scale, *([] if zero is None else [zero]))


class Unit(NamedTuple):
    """Of work: TILE rows of W from `row`, and steps of its columns."""

    row: Any
    split: Any
    first: Any
    end: Any


def _unit(index, splits: int, steps: int) -> Unit:
    split = lax.rem(index, splits)
    first, end = (lax.div(s * steps, splits) for s in (split, split + 1))
    return Unit(lax.div(index, splits) * TILE, split, first, end)


def _load(refs: Refs, unit: Unit, done, p: Plan) -> None:
    def step(k, _):
        count = done + k - unit.first
        slot = lax.rem(count, p.stages)

        @pl.when(count >= p.stages)
        def when_it_is_free():
            plgpu.barrier_wait(refs.consumed.at[slot])

        tile = refs.words.at[pl.ds(unit.row, TILE), pl.ds(k * p.words, p.words)]
        plgpu.copy_gmem_to_smem(tile, refs.w_tile.at[slot], refs.loaded.at[slot])
        tile = refs.x.at[:, pl.ds(k * p.columns, p.columns)]
        plgpu.copy_gmem_to_smem(tile, refs.x_tile.at[slot], refs.loaded.at[slot])

    lax.fori_loop(unit.first, unit.end, step, None)


def _compute(refs: Refs, unit: Unit, done, wg, p: Plan, interpret: bool) -> None:
    rows, m = pl.ds(unit.row + wg * ROWS, ROWS), refs.x.shape[0]
    blocks = range(0, p.columns, p.block)

    def tables(k):
        """What the blocks of step k are scaled by."""
        return [_tables(refs, rows, lax.div(k * p.columns + b, p.groups), p) for b in blocks]

    def step(k, carry):
        total, beside = carry
        # Read a step ahead: a thread's few bytes come from memory each on its own.
        following = tables(lax.min(k + 1, unit.end - 1))
        slot = lax.rem(done + k - unit.first, p.stages)
        plgpu.barrier_wait(refs.loaded.at[slot])
        words = registers.load(refs.w_tile.at[slot, pl.ds(wg * ROWS, ROWS)], p.order)
        for b, (scale, zero) in zip(blocks, beside, strict=True):
            block = words[:, b * p.order.bits // 32 : (b + p.block) * p.order.bits // 32]
            w = _decoded(block, scale, zero, p, interpret)
            if interpret:
                w = _in_memory(refs.operand.at[wg], w)
            xt = refs.x_tile.at[slot, :, pl.ds(b, p.block)].transpose((1, 0))
            total = _multiply_add(total, w, xt, None if p.scaled_first else scale)
        plgpu.barrier_arrive(refs.consumed.at[slot])
        return total, following

    total = plgpu.layout_cast(jnp.zeros((ROWS, m), jnp.float32), plgpu.Layout.WGMMA)
    total, _ = lax.fori_loop(unit.first, unit.end, step, (total, tables(unit.first)))
    # One number to a register, as neighbours are not side by side in the transpose.
    total = plgpu.layout_cast(total, plgpu.Layout._WGMMA_ACC_32BIT)
    refs.out.at[unit.split, :, rows].transpose((1, 0))[...] = total


def _tables(refs: Refs, rows, group, p: Plan):
    """Scales and zero points of a block as they are stored, or None, in registers: beside an
    operand's codes, or, of a block that is scaled afterwards, beside a product's rows.
    """

    def beside(table):
        columns = pl.ds(group, max(p.block // p.groups, 1))
        return registers.load_shared(table.at[rows, columns], p.groups, p.order)

    zero = None if refs.zero is None else beside(refs.zero)
    if p.scaled_first:
        return beside(refs.scale), zero
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.load(refs.scale.at[rows, group], layout=layout, optimized=False), zero


def _decoded(words, scale, zero, p: Plan, interpret: bool):
    """A block of W [64, block] in bfloat16, scaled if that must be before the product."""

    def shared(values):
        values = values.astype(jnp.bfloat16)
        return registers.shared(values, p.groups, p.order, p.block, interpret)

    w = codes.decode_words(words, p.kind, p.order, interpret)
    if zero is not None:
        w -= shared(zero.astype(jnp.float32) - 2.0 ** (p.order.bits - 1))
    return w * shared(as_float(scale)) if p.scaled_first else w


def _in_memory(operand, w):
    """Where the interpreter wants wgmma's first operand."""
    operand[...] = w
    plgpu.commit_smem()
    return operand


def _multiply_add(total, w, xt, scale):
    """total + w xt, scaled if w is not."""

    def product(acc):
        plgpu.wgmma(acc, w, xt)
        return acc[...]  # which waits for it: w's registers, which it reads too, are free again

    found = pl.run_scoped(product, plgpu.ACC(total.shape, jnp.float32))
    if scale is None:
        return total + found
    return total + found * lax.broadcast_in_dim(as_float(scale), total.shape, (0,))


def as_float(scale):
    """A stored scale in float32. E8M0 is given by its bits."""
    if scale.dtype == jnp.float8_e4m3fn:
        scale = scale.astype(jnp.float16)  # the one type that it is cast to
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    exponent = scale.astype(jnp.uint32)
    bits = jnp.where(exponent == 0, jnp.uint32(1 << 22), exponent << jnp.uint32(23))
    bits = jnp.where(exponent == 255, jnp.uint32(0x7FC00000), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _buffers(shape: tuple[int, ...], dtype, swizzled: bool = True):
    """In shared memory, swizzled: as wgmma reads them, and so that a tile's rows meet in no bank.
    Tiles of swizzled bytes would cut a thread's three words of 3-bit codes apart.
    """
    if not swizzled:
        return plgpu.SMEM(shape, dtype)
    size = jnp.dtype(dtype).itemsize
    swizzle = next(swizzle for swizzle in (128, 64, 32) if shape[-1] * size % swizzle == 0)
    tiling = plgpu.TilingTransform((8, swizzle // size))  # type: ignore[abstract]
    swizzling = plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzling))
