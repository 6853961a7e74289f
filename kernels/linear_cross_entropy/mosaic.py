"""Products and what follows from them in one kernel, for Hopper GPUs.

Forward: each warpgroup keeps its tokens' running maximum and sum of exponentials over a range of
the vocabulary in registers; XLA combines the ranges. The target's logit is one product per token,
which XLA makes of w's rows. Backward: a kernel writes ∂L/∂(h wᵀ) of a chunk of the vocabulary in
bfloat16, and XLA's products make the gradients of it (`chunks`).
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels.linear_cross_entropy import tiles
from kernels.linear_cross_entropy.differentiable import Form
from kernels.linear_cross_entropy.xla import finite

WIDTH = 256  # entries of a tile: 128 registers of each thread hold its logits
LOG2E = math.log2(math.e)  # the hardware's exponential is 2^x


def lacks(h, w) -> str | None:
    """Why the kernel cannot take them."""
    if h.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"takes bfloat16, and h and w are {h.dtype} and {w.dtype}"
    if h.shape[1] % 8 or not h.shape[1]:
        return f"takes D in multiples of 8, and D={h.shape[1]}"
    if not h.shape[0]:
        return "takes one token or more, and T=0"
    return None


def statistics(h, w, y, *, cap, interpret: bool):
    return form(interpret)(h, w, y, cap)


@functools.cache  # one object for each: forms are compared when functions are traced again
def form(interpret: bool) -> Form:
    settings = {"interpret": interpret, "sms": tiles.CLUSTER if interpret else tiles.SMS}
    return Form(functools.partial(_forward, **settings), functools.partial(_cotangent, **settings))


def _forward(h, w, y, cap, *, interpret, sms):
    highest, total = _partial_sums(h, w, cap, interpret, sms)
    base = finite(highest.max(axis=0))
    lse = (base + jnp.log2((total * jnp.exp2(highest - base)).sum(axis=0))) / LOG2E
    target = jnp.einsum("td,td->t", h, w[y], preferred_element_type=lse.dtype)
    return lse[: h.shape[0]], target if cap is None else cap * jnp.tanh(target / cap)


def _partial_sums(h, w, cap, interpret, sms):
    """max log2(e) l and Σ 2^(log2(e) l - max) of each range of the vocabulary, [ranges, tokens]."""
    vocabulary = w.shape[0]
    plan = tiles.schedule(h.shape[0], vocabulary, WIDTH, sms)

    def begin(row):
        return tiles.constant(-jnp.inf), tiles.constant(0.0)

    def use(state, logits, row, column):
        highest, total = state
        return accumulate(highest, total, bounded(in_bits(logits[0], cap), column, vocabulary))

    def body(h, w, highest_out, total_out):
        def scoped(out):
            def finish(state, row, part):
                tiles.store_rows(out, state, [highest_out.at[part], total_out.at[part]], row)

            stages = tiles.stages(WIDTH, reserved=2048)
            tiles.each_tile([(h, w)], plan, begin, use, finish, stages=stages)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, tiles.row_buffers(2), collective_axes="warpgroup")

    out = jax.ShapeDtypeStruct((plan.ranges, plan.groups * tiles.TOKENS), jnp.float32)
    return tiles.kernel("logsumexp", body, plan, (out, out), interpret)(h, w)


def in_bits(logits, cap):
    """log2(e) times the logits, capped: what 2^x makes their exponential of."""
    if cap is None:
        return logits * LOG2E
    # tanh(x / cap) = 1 - 2 / (1 + e^(2x / cap)), to 1e-6; the hardware's own tanh is 5e-4 off.
    # 1 / u is rsqrt(u)², one instruction where a division is many.
    root = lax.rsqrt(1 + jnp.exp2(logits * (2 * LOG2E / cap)))
    return (cap * LOG2E) * (1 - 2 * root * root)


def bounded(z, column, vocabulary):
    """Rows of zeros that lie beyond w's are no logits."""
    if vocabulary % WIDTH == 0:
        return z
    return jnp.where(tiles.columns(z.shape, column) < vocabulary, z, -jnp.inf)


def accumulate(highest, total, z):
    """`xla.accumulate` in base 2, of a tile."""
    raised = jnp.maximum(highest, z.max(axis=1))
    base = jnp.where(jnp.abs(raised) < jnp.inf, raised, 0.0)
    terms = jnp.exp2(z - tiles.across(base, z.shape)).sum(axis=1)
    return raised, total * jnp.exp2(highest - base) + terms


def _cotangent(h, w, y, lse, by_lse, by_target, start, size, cap, *, interpret, sms):
    """`xla.cotangent`, of logits that never leave the registers."""
    tokens = h.shape[0]
    plan = tiles.schedule(tokens, size, WIDTH, sms)

    def body(h, w, y, lse, by_lse, by_target, start, out):
        start = start[0]

        def begin(row):
            return [tiles.load_rows(x, row) for x in (y, lse, by_lse, by_target)]

        def scoped(buffers):
            def use(state, logits, row, column):
                def part(first):
                    x = logits[0][:, first : first + tiles.STEP]
                    y, lse, by_lse, by_target = (tiles.across(v, x.shape) for v in state)
                    bits = in_bits(x, cap)
                    d = by_lse * jnp.exp2(bits - lse)
                    at_target = tiles.columns(x.shape, start + column + first) == y
                    d = jnp.where(at_target, d + by_target, d)
                    if cap is not None:
                        tanh = bits * (1 / (cap * LOG2E))
                        d -= d * tanh * tanh
                    return d.astype(out.dtype)

                tiles.store_tile(buffers, part, WIDTH, out, row, column)
                return state

            stages = tiles.stages(WIDTH, reserved=tiles.TILE_BYTES)
            tiles.each_tile([(h, w)], plan, begin, use, lambda *_: None, stages=stages, start=start)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, tiles.tile_buffers(out.dtype), collective_axes="warpgroup")

    # Copies take rows of whole 16 bytes; what lies outside of `out` is not written.
    out = jax.ShapeDtypeStruct((tokens, -(-size // 8) * 8), jnp.bfloat16)
    per_token = (y.astype(jnp.int32), lse * LOG2E, by_lse, by_target)
    padding = (0, plan.groups * tiles.TOKENS - tokens)
    arguments = (*(jnp.pad(x, padding) for x in per_token), jnp.int32(start).reshape(1))
    return tiles.kernel("cotangent", body, plan, out, interpret)(h, w, *arguments)[:, :size]
