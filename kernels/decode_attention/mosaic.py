"""A split of a sequence's cache for each block of the grid, for Hopper GPUs.

Reading the cache is what takes time, so it is turned to stand where it costs least: keys and values
are the 64 rows of wgmma that every product has to have, and the queries of a key-value head its few
columns. With c keys in a block,
    scores [c, N] = K [c, h] qᵀ [h, N],        out [h, N] += Vᵀ [h, c] P [c, N].
Codes become bfloat16 (float16 for E4M3: exact, and one instruction for two) in registers. Keys go
into the product from there; values pass through shared memory, which wgmma reads in either major.
Softmax runs along, in float32; what the splits found is put together by XLA.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

SMS = 132  # of an H200
RESIDENT = 4  # blocks of the grid on one of them
WAVES = 2  # of blocks, that the splits are to make up
BLOCK = 64  # keys
STAGES = {"int8": 2, "int4": 4, "fp8": 2, "float": 2}  # of 8 to 32 KB
LEAST = 4  # blocks of a split
REGISTERS = 4096  # numbers of a result, seen not to spill

WGMMA = plgpu.Layout.WGMMA
OF_BYTES = plgpu.Layout.WGMMA_UPCAST_2X
OF_KEYS, OF_QUERIES = WGMMA.reduce(1), WGMMA.reduce(0)  # vectors beside [keys, queries]


def lacks(q, k, kind, k_scale, v_scale) -> str | None:
    (b, n, h), (_, s, heads, _) = q.shape, k.shape
    if b == 0 or s == 0:
        return f"takes at least one place of one sequence, and k.shape={k.shape}"
    least = 128 if kind == "int4" else 64
    if q.dtype != jnp.bfloat16 or kind == "float" and k.dtype != q.dtype:
        return f"takes q, and k and v that are floats, in bfloat16, and q.dtype={q.dtype}"
    if h % least or h > 256:
        return f"takes h in multiples of {least} up to 256 for kind={kind!r}, and h={h}"
    if n // heads > (most := REGISTERS // h):
        return f"takes up to {most} queries to a key-value head for h={h}, and q has {n // heads}"
    if s % 8:
        return f"takes S in multiples of 8, and S={s}"
    if s % BLOCK and any(x is not None and x.ndim == 3 for x in (k_scale, v_scale)):
        return f"takes scales for each place with S in multiples of {BLOCK}, and S={s}"
    return None


def splits(b: int, s: int, heads: int) -> int:
    """Blocks of the grid to a sequence and head: whole waves of them, none too short."""
    most = max(1, -(-s // (BLOCK * LEAST)))
    return max(1, min(most, WAVES * RESIDENT * SMS // (b * heads)))


def decode_attention(
    q, k, v, lengths, k_scale, v_scale, *, kind, window, scale, cap, interpret=False
):
    (b, n, h), (_, s, heads, _) = q.shape, k.shape
    group = n // heads
    columns = -(-group // 8) * 8
    q = jnp.pad(q.reshape(b, heads, group, h), ((0, 0), (0, 0), (0, columns - group), (0, 0)))
    factor = jnp.full((b, heads, columns), scale * (1 if cap else math.log2(math.e)), jnp.float32)
    q, factor = _queries(q, factor / (cap or 1), kind)
    k_place, v_place = (x if x is not None and x.ndim == 3 else None for x in (k_scale, v_scale))
    if k_scale is not None and k_place is None:
        factor = factor * k_scale.astype(jnp.float32)

    body = functools.partial(_body, kind=kind, window=window, cap=cap, interpret=interpret)
    count = splits(b, s, heads)
    partial = jax.ShapeDtypeStruct((b, heads, count, columns), jnp.float32)
    out, most, total = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((b, heads, count, h, columns), jnp.float32),
            partial,
            partial,
        ),
        grid=(heads, count, b),
        grid_names=("head", "split", "sequence"),
        scratch_types=_scratch(q.dtype, h, columns, kind, interpret),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        kernel_name=f"decode_attention_{kind}",
    )(q, _bytes(k), _bytes(v), lengths, factor, k_place, v_place)

    y = _joined(_combined(out, most, total), kind)[:, :, :group].reshape(b, n, h)
    if v_scale is not None and v_place is None:
        y = y * v_scale.astype(jnp.float32)
    return y.astype(jnp.bfloat16)


def _bytes(codes):
    """A pair of 4-bit codes as an int8, which Mosaic turns into bfloat16 in few instructions."""
    return lax.bitcast_convert_type(codes, jnp.int8) if codes.dtype == jnp.uint8 else codes


def _queries(q, factor, kind):
    """Queries as the kernel's products take them, and what scores are then to be multiplied by."""
    if kind == "int4":  # against even channels, then odd ones, whose codes come times 16
        return jnp.concatenate([q[..., 0::2], q[..., 1::2] / 16], -1), factor
    if kind == "fp8":  # float16 has not bfloat16's range: out with the power of two of each
        _, power = jnp.frexp(jnp.abs(q).max(-1).astype(jnp.float32))
        q = jnp.ldexp(q.astype(jnp.float32), -power[..., None]).astype(jnp.float16)
        return q, jnp.ldexp(factor, power)
    return q, factor


def _combined(out, most, total):
    """[B, heads, queries, h] of what the splits found; zeros where none found anything."""
    largest = most.max(2, keepdims=True)
    weight = jnp.where(total == 0, 0, jnp.exp2(most - largest))
    whole = (weight * total).sum(2)
    y = jnp.einsum("bksn,bkshn->bknh", weight, out, precision="highest")
    return y / jnp.where(whole == 0, 1, whole)[..., None]


def _joined(y, kind):
    """Channels in their order again."""
    if kind != "int4":
        return y
    even, odd = jnp.split(y, 2, -1)
    return jnp.stack([even, odd / 16], -1).reshape(y.shape)


def _tiled(columns: int, bits: int):
    swizzle = plgpu.find_swizzle(columns * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))  # type: ignore[abstract]
    return (tiling, plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]


def _scratch(dtype, h, columns, kind, interpret):
    scratch = dict(
        q_smem=plgpu.SMEM((columns, h), dtype, transforms=_tiled(64, 16)),
        p_smem=plgpu.SMEM((columns, BLOCK), dtype, transforms=_tiled(64, 16)),
        ready=plgpu.Barrier(),
    )
    if kind != "float":
        scratch["v_wide"] = plgpu.SMEM((BLOCK, h), dtype, transforms=_tiled(64, 16))
        if interpret:
            scratch["k_wide"] = scratch["v_wide"]
    return scratch


def _body(
    q, k, v, lengths, factor, k_scale, v_scale, out, most, total,
    *, q_smem, p_smem, ready, v_wide=None, k_wide=None, kind, window, cap, interpret,
):  # fmt: skip
    head, split, b = (lax.axis_index(axis) for axis in ("head", "split", "sequence"))
    columns, h = q_smem.shape
    width = k.shape[-1]
    shape = (BLOCK, columns)
    plgpu.copy_gmem_to_smem(q.at[b, head], q_smem, ready)

    length = jnp.minimum(lengths[b], k.shape[1])
    begin = jnp.int32(0) if window is None else jnp.maximum(length - window, 0)
    first = lax.div(begin, jnp.int32(BLOCK))
    blocks = lax.div(length + (BLOCK - 1), jnp.int32(BLOCK)) - first
    each = lax.div(blocks + (most.shape[2] - 1), jnp.int32(most.shape[2]))
    first = first + split * each
    steps = jnp.clip(blocks - split * each, 0, each)

    times = plgpu.load(factor.at[b, head], layout=OF_QUERIES, optimized=False)
    places = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
    plgpu.barrier_wait(ready)

    def step(index, k_smem, v_smem, carry):
        largest, sums, y = carry
        start = (first + index[0]) * BLOCK
        scores = _scores(k_smem, q_smem, kind, k_wide if interpret else None)
        scores = scores * lax.broadcast_in_dim(times, shape, [1])
        if k_scale is not None:
            scores = scores * _of_places(k_scale, b, start, head, shape)
        if cap is not None:  # cap tanh(x), in powers of two
            scores = 1 - 2 / (jnp.exp2(scores * (2 * math.log2(math.e))) + 1)
            scores = scores * (cap * math.log2(math.e))
        place = places + start
        scores = jnp.where((place >= begin) & (place < length), scores, -jnp.inf)

        larger = jnp.maximum(largest, scores.max(axis=0))
        shrink = jnp.exp2(largest - larger)
        p = jnp.exp2(scores - lax.broadcast_in_dim(larger, shape, [1]))
        sums = sums * lax.broadcast_in_dim(shrink, shape, [1]) + p
        if v_scale is not None:
            p = p * _of_places(v_scale, b, start, head, shape)
        turned = plgpu.layout_cast(p.astype(p_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        p_smem.transpose((1, 0))[...] = turned
        if kind != "float":
            for part, codes in enumerate(_wide(v_smem, v_wide.dtype, kind, OF_BYTES)):
                v_wide.at[:, pl.ds(part * width, width)][...] = codes
        plgpu.commit_smem()
        found = _product(
            (h, columns), ((v_smem if kind == "float" else v_wide).transpose((1, 0)),),
            (p_smem.transpose((1, 0)),),
        )  # fmt: skip
        return larger, sums, y * lax.broadcast_in_dim(shrink, (h, columns), [1]) + found

    def block(index):
        return b, first + index, head, 0

    bits = 8 * k.dtype.itemsize
    spec = plgpu.BlockSpec((None, BLOCK, None, width), block, transforms=_tiled(width, bits))
    largest, sums, y = plgpu.emit_pipeline(
        step,
        grid=(steps,),
        in_specs=[spec, spec],
        max_concurrent_steps=STAGES[kind],
        init_carry=(
            plgpu.layout_cast(jnp.full((columns,), -jnp.inf, jnp.float32), OF_QUERIES),
            plgpu.layout_cast(jnp.zeros(shape, jnp.float32), WGMMA),
            plgpu.layout_cast(jnp.zeros((h, columns), jnp.float32), WGMMA),
        ),
    )(k, v)
    out[b, head, split] = y
    most[b, head, split] = largest
    total[b, head, split] = sums.sum(axis=0)


def _scores(k_smem, q_smem, kind, k_wide):
    """[keys, queries]. k_wide: where keys go that the interpreter cannot take from registers."""
    width, shape = k_smem.shape[-1], (BLOCK, q_smem.shape[0])
    if kind == "float":
        return _product(shape, (k_smem,), (q_smem.transpose((1, 0)),))
    keys = _wide(k_smem, q_smem.dtype, kind, WGMMA)
    of = [pl.ds(part * width, width) for part in range(len(keys))]
    if k_wide is not None:
        for part, codes in zip(of, keys, strict=True):
            k_wide.at[:, part][...] = codes
        plgpu.commit_smem()
        keys = [k_wide.at[:, part] for part in of]
    return _product(shape, keys, [q_smem.at[:, part].transpose((1, 0)) for part in of])


def _wide(ref, dtype, kind, layout):
    """Codes as floats: two parts of 4-bit ones, the even channels and the odd ones times 16.

    They are read four at a time, and brought into the order of `layout` while they are bytes.
    """
    codes = plgpu.load(ref, layout=OF_BYTES)
    if kind != "int4":
        return [plgpu.layout_cast(codes, layout).astype(dtype)]
    even, odd = (codes & 15) ^ 8, codes & -16
    return [
        plgpu.layout_cast(even, layout).astype(dtype) - 8,
        plgpu.layout_cast(odd, layout).astype(dtype),
    ]


def _product(shape, lefts, rights):
    def run(acc):
        for left, right in zip(lefts, rights, strict=True):
            plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _of_places(scale, b, start, head, shape):
    """A scale of each key, beside scores."""
    place = scale.at[b, pl.ds(start, BLOCK), head]
    found = plgpu.load(place, layout=OF_KEYS, optimized=False)
    return lax.broadcast_in_dim(found.astype(jnp.float32), shape, [0])
