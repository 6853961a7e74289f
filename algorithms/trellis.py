"""Trellis-coded quantization. Tseng, Sun, Hou, De Sa, NeurIPS 2024, arXiv:2406.11235, Sec. 2.3, 3.
Notes: papers/qtip.md.

The bitshift trellis of L-bit states, k bits a step: a state is a window of L bits on a stream, and
the next one lies k bits on. Each state stands for a value, c(s). For a sequence x of T values,
    minimise Σ_t (x_t - c(s_t))²   over walks   s_{t+1} mod 2^(L-k) overlap = s_t's last L - k bits
which is exact by dynamic programming (Viterbi). With m the L - k bits that two neighbours share,
    best_{t+1}[m'] = min_j  best_t[s >> k] + (x_t - c(s))²,   s = (j, m') in bits.
A walk that ends on the shared bits it began with ("tail-biting") is kT bits in a circle.
"""

import functools
import math
import statistics

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

CODES = ("3inst", "1mad", "lut")
LANES = 2**18  # states times sequences in flight, so that costs stay in a core's cache; measured


def decode(states: Int[Array, "*n"], code: str, state_bits: int) -> Float[Array, "*n"]:
    """c(s): the values that states stand for, nearly those of a standard normal variable."""
    if code == "lut":
        return jnp.asarray(_normal_quantiles(state_bits))[states]
    s = states.astype(jnp.uint32)
    return _one_mad(s) if code == "1mad" else _three_instructions(s)


def levels(code: str, state_bits: int) -> Float[Array, " s"]:
    """The values of all 2^L states."""
    return decode(jnp.arange(2**state_bits), code, state_bits)


def _one_mad(s):
    """Alg. 1: a linear congruential step, and the sum of its four bytes, centred and scaled.

    A product, as compilers make one of a division by a constant: jitted or not, the same bits.
    """
    s = s * jnp.uint32(34038481) + jnp.uint32(76625530)
    total = sum((s >> shift) & jnp.uint32(255) for shift in (0, 8, 16, 24))
    return (total.astype(jnp.float32) - 510) * jnp.float32(1 / 147.800537109375)


def _three_instructions(s):
    """Alg. 2: signs, low exponent bits and mantissas of two float16, whose sum it is.

    The sum is rounded to float16 as on the authors' device; `reduce_precision` is never optimized
    away, where a cast to float16 and back may be.
    """
    s = s * jnp.uint32(89226354) + jnp.uint32(64248484)
    s = (s & jnp.uint32(0x8FFF8FFF)) ^ jnp.uint32(996162400)
    halves = (s >> 16).astype(jnp.uint16), s.astype(jnp.uint16)
    a, b = (lax.bitcast_convert_type(h, jnp.float16).astype(jnp.float32) for h in halves)
    return lax.reduce_precision(a + b, exponent_bits=5, mantissa_bits=10)


@functools.cache
def _normal_quantiles(state_bits: int) -> np.ndarray:
    """2^L quantiles of a normal variable, shuffled by a bijection of L bits, so that states with
    bits in common have nothing else in common. A constant of the graph: always the same bits.
    """
    n = 2**state_bits
    rank = np.arange(n)
    for factor in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35):  # odd: each step can be undone
        rank = rank * factor % n
        rank ^= rank >> (state_bits // 2)
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((r + 0.5) / n) for r in rank.tolist()], np.float32)


def viterbi(
    x: Float[Array, "b t"],
    levels: Float[Array, " s"],
    bits: int,
    seam: Int[Array, " b"] | None = None,
) -> Int[Array, "b t"]:
    """The nearest walk to each sequence, as states; of equally near ones the first.

    seam: if given, walks are held to begin and to end on these L - k bits.
    """
    (b, t), s = x.shape, levels.shape[0]
    k, m = 2**bits, s // 2**bits
    # [j, m' = (m / k, k)]: what comes before state (j, m') is best[j, m / k], for all k alike, so
    # that a step is k sums that broadcast, without a gather. Sequences are last: lanes of a vector.
    values = levels.reshape(k, m // k, k, 1)

    def step(best, x_t):
        before, x_t = best.reshape(k, m // k, 1, b), x_t[None, None]
        least, choice = before[0] + (x_t - values[0]) ** 2, jnp.zeros((m // k, k, b), jnp.uint8)
        for j in range(1, k):
            cost = before[j] + (x_t - values[j]) ** 2
            choice = jnp.where(cost < least, jnp.uint8(j), choice)
            least = jnp.where(cost < least, cost, least)
        return least.reshape(m, b), choice.reshape(m, b)

    free = jnp.zeros((m, b), x.dtype)
    held = free if seam is None else jnp.where(jnp.arange(m)[:, None] == seam[None], free, jnp.inf)
    best, choices = lax.scan(step, held, x.T)
    last = jnp.argmin(best, axis=0).astype(jnp.int32) if seam is None else seam.astype(jnp.int32)

    def back(shared, step):
        state = choices[step, shared, jnp.arange(b)].astype(jnp.int32) * m + shared
        return state >> bits, state

    _, states = lax.scan(back, last, jnp.arange(t), reverse=True)
    return states.T


def quantize(x: Float[Array, "b t"], levels: Float[Array, " s"], bits: int) -> Int[Array, "b t"]:
    """A near walk that bites its tail, for each sequence (Alg. 4).

    Once around from the middle, freely, to learn the L - k bits at the seam; once from the seam.
    Sequences go in batches of a size that keeps costs in cache; the result does not depend on it.
    """
    b, t = x.shape
    lanes = max(16, min(64, LANES // levels.shape[0]))
    batches = -(-b // lanes)
    each = 8 * -(-b // (8 * batches))  # whole vectors
    padded = jnp.pad(x, ((0, batches * each - b), (0, 0))).reshape(batches, each, t)

    def quantize_batch(x):
        around = viterbi(jnp.roll(x, t // 2, axis=1), levels, bits)
        return viterbi(x, levels, bits, seam=around[:, t // 2] >> bits)

    return lax.map(quantize_batch, padded).reshape(-1, t)[:b]


def check(length: int, bits: int, state_bits: int) -> None:
    """Raise ValueError unless walks of this length bite their tail and fill whole bytes."""
    if not max(2 * bits, 8) <= state_bits <= 16:
        raise ValueError(
            f"state_bits={state_bits} must be from 8 to 16, and at least twice bits={bits}."
        )
    packed_width(length, bits)
    if length * bits < state_bits:
        raise ValueError(
            f"A walk of {length} steps of bits={bits} is shorter than state_bits={state_bits}."
        )


def packed_width(length: int, bits: int) -> int:
    """Bytes of a walk; raises ValueError unless it fills them."""
    if length * bits % 8:
        raise ValueError(f"A walk of {length} steps of bits={bits} does not fill whole bytes.")
    return length * bits // 8


def pack(states: Int[Array, "*r t"], bits: int, state_bits: int) -> UInt8[Array, "*r n"]:
    """The circular stream of a tail-biting walk, kT bits, the first one highest in its byte.

    State t is the window of L bits from bit kt on, so its first k bits are the stream's own there.
    """
    width = packed_width(states.shape[-1], bits)
    symbols = (states >> (state_bits - bits))[..., None]
    stream = jnp.concatenate([symbols >> bit & 1 for bit in reversed(range(bits))], axis=-1)
    return jnp.packbits(stream.reshape(*states.shape[:-1], 8 * width).astype(bool), axis=-1)


def unpack(packed: UInt8[Array, "*r n"], bits: int, state_bits: int) -> Int[Array, "*r t"]:
    """The states of a packed walk: each a window of its own, whatever the others are."""
    *rows, width = packed.shape
    word = packed.astype(jnp.int32)
    word = word << 16 | jnp.roll(word, -1, axis=-1) << 8 | jnp.roll(word, -2, axis=-1)
    shared = math.gcd(bits, 8)
    windows = []
    for step in range(8 // shared):  # then the pattern of bytes and shifts repeats
        byte, shift = divmod(step * bits, 8)
        window = word[..., byte :: bits // shared] >> (24 - shift - state_bits)
        windows.append(window & (2**state_bits - 1))
    return jnp.stack(windows, -1).reshape(*rows, 8 * width // bits)
