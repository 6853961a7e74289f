"""Products and what follows from them in one kernel, for Hopper GPUs.

Forward: each warpgroup keeps its tokens' running maximum and sum of exponentials over a range of
the vocabulary in registers; XLA combines the ranges. The target's logit is one product per token,
which XLA makes of w's rows. Backward: a kernel writes ∂L/∂(h wᵀ) of a chunk of the vocabulary in
bfloat16, and XLA's products make the gradients of it (`chunks`).
"""

import functools
import math

import jax.numpy as jnp
from jax import lax

from kernels.linear_cross_entropy import passes, tiles
from kernels.linear_cross_entropy.differentiable import Form
from kernels.linear_cross_entropy.xla import finite

WIDTH = 256  # entries of a tile: 128 registers of each thread hold its logits
LOG2E = math.log2(math.e)  # the hardware's exponential is 2^x


def lacks(h, w, names: str = "h and w") -> str | None:
    """Why the kernel cannot take them."""
    if h.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
        return f"takes bfloat16, and {names} are {h.dtype} and {w.dtype}"
    if h.shape[1] % 8 or not h.shape[1]:
        return f"takes D in multiples of 8, and D={h.shape[1]}"
    if not h.shape[0]:
        return "takes one token or more, and T=0"
    # TMA cuts swizzled arrays into whole tiles of 8 rows and 64 columns, or less than one.
    for name, size, tile in (("D", h.shape[1], 64), ("T", h.shape[0], 8), ("V", w.shape[0], 8)):
        if size > tile and size % tile:
            return f"takes {name} up to {tile} or in multiples of it, and {name}={size}"
    return None


def statistics(h, w, y, *, cap, interpret: bool):
    return form(interpret)(h, w, y, cap)


@functools.cache  # one object for each: forms are compared when functions are traced again
def form(interpret: bool) -> Form:
    settings = {"interpret": interpret, "sms": tiles.CLUSTER if interpret else tiles.SMS}
    return Form(functools.partial(_forward, **settings), functools.partial(_cotangent, **settings))


def _forward(h, w, y, cap, *, interpret, sms):
    lse = logsumexp(h, w, cap=cap, interpret=interpret, sms=sms)
    target = jnp.einsum("td,td->t", h, w[y], preferred_element_type=lse.dtype)
    return lse, target if cap is None else cap * jnp.tanh(target / cap)


def logsumexp(h, w, *, cap=None, temperature=1.0, interpret, sms):
    """log Σ_v exp(l_v / temperature) of each token."""
    vocabulary = w.shape[0]
    plan = tiles.schedule(h.shape[0], vocabulary, WIDTH, sms)

    def use(state, _, logits, column):
        highest, total = state
        z = in_bits(logits[0] * (1 / temperature), cap)
        z = tiles.bounded(z, column, vocabulary, -jnp.inf, plan)
        return list(accumulate(highest, total, z))

    highest, total = passes.totals("logsumexp", [(h, w)], [], plan, [-jnp.inf, 0.0], use, interpret)
    base = finite(highest.max(axis=0))
    return (base + jnp.log2((total * jnp.exp2(highest - base)).sum(axis=0))) / LOG2E


def in_bits(logits, cap):
    """log2(e) times the logits, capped: what 2^x makes their exponential of."""
    if cap is None:
        return logits * LOG2E
    # tanh(x / cap) = 1 - 2 / (1 + e^(2x / cap)), to 1e-6; the hardware's own tanh is 5e-4 off.
    # 1 / u is rsqrt(u)², one instruction where a division is many.
    root = lax.rsqrt(1 + jnp.exp2(logits * (2 * LOG2E / cap)))
    return (cap * LOG2E) * (1 - 2 * root * root)


def accumulate(highest, total, z):
    """`xla.accumulate` in base 2, of a tile."""
    raised = jnp.maximum(highest, z.max(axis=1))
    base = jnp.where(jnp.abs(raised) < jnp.inf, raised, 0.0)
    terms = jnp.exp2(z - tiles.across(base, z.shape)).sum(axis=1)
    return raised, total * jnp.exp2(highest - base) + terms


def _cotangent(h, w, y, lse, by_lse, by_target, start, size, cap, *, interpret, sms):
    """`xla.cotangent`, of logits that never leave the registers."""
    plan = tiles.schedule(h.shape[0], size, WIDTH, sms)

    def part(logits, per_token, entries):
        y, lse, by_lse, by_target = per_token
        bits = in_bits(logits[0], cap)
        d = by_lse * jnp.exp2(bits - lse)
        d = jnp.where(entries == y, d + by_target, d)
        if cap is not None:
            tanh = bits * (1 / (cap * LOG2E))
            d -= d * tanh * tanh  # in this form, without spilling registers
        return d

    per_token = [y, lse * LOG2E, by_lse, by_target]
    return passes.each_entry("cotangent", [(h, w)], per_token, plan, part, start, size, interpret)
