"""The lattice E8 and its codebooks of 2, 3 and 4 bits a weight. Tseng et al., ICML 2024,
arXiv:2402.04396, Sec. 4.2; nearest points of D8 and E8 by Conway and Sloane, IEEE Trans. Inf.
Theory 28(2), 1982. Notes: papers/quip_sharp.md.

D8 holds the whole vectors with an even sum, and E8 = D8 ∪ (D8 + 1/2). E8P is 2^16 points of
E8 + 1/4: with S a table of 256 vectors of magnitudes 1/2, 3/2 and 5/2,
    E8P = {v + t : v ∈ D8 + 1/2, |v| ∈ S, t = ± 1/4}
A code is 16 bits: 8 for the row of S, 7 for signs (the eighth follows from the even sum), 1 for t.
What E8P leaves can be coded again, finer: by 256 short points of E8, or by E8P itself.
"""

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8, UInt16

# The 29 of 56 patterns with five 3/2 that fill S up to 256: where the three 1/2 are.
_HALVES_AT = """
    123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057
    047 056 046 014 237
"""


def _magnitudes() -> np.ndarray:
    """S [256, 8]: all with a squared norm up to 10, in order, then the 29."""
    every = np.array(list(itertools.product((0.5, 1.5, 2.5), repeat=8)))
    short = every[(every**2).sum(1) <= 10]
    long = np.full((29, 8), 1.5)
    for row, positions in zip(long, _HALVES_AT.split(), strict=True):
        row[[int(i) for i in positions]] = 0.5
    return np.concatenate([short, long])


def _short_e8() -> np.ndarray:
    """[256, 8]: zero, the 240 shortest vectors of E8, and 15 of the next length."""
    whole = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=8)))
    half = np.array(list(itertools.product((-0.5, 0.5), repeat=8)))
    both = np.concatenate([whole, half])
    roots = both[(both.sum(1) % 2 == 0) & ((both**2).sum(1) <= 2)]
    return np.concatenate([roots, 2 * np.eye(8), -2 * np.eye(8)[:7]])


# By bits, for unit normal entries, as the official code has them: what x is multiplied by to have
# the least error (at 4 bits 0.95 has less), and what the error that E8P leaves is multiplied by.
NORMAL_SCALE = {2: 1.03, 3: 0.98, 4: 1.03}
RESIDUAL_SCALE = {3: 2.04, 4: 3.45}

MAGNITUDES = _magnitudes()
SHORT_E8 = _short_e8()
_ODD = MAGNITUDES.sum(1) % 2 == 1  # rows of S that need an odd number of minus signs
_SIGN_BIT = np.array([0, 4, 1, 5, 2, 6, 3, 7], np.int32)  # of each entry; bit 0 is t's as well


def nearest_d8(x: Float[Array, "*n 8"]) -> Float[Array, "*n 8"]:
    """The nearest whole vector with an even sum: round, and if the sum is odd, round the entry that
    is farthest from its whole number the other way.
    """
    near = jnp.round(x)
    off = x - near
    worst = jnp.arange(8) == jnp.argmax(jnp.abs(off), -1, keepdims=True)
    odd = near.sum(-1, keepdims=True) % 2 == 1
    return jnp.where(odd & worst, near + jnp.where(off < 0, -1, 1), near)


def nearest_e8(x: Float[Array, "*n 8"]) -> Float[Array, "*n 8"]:
    """The nearest point of E8 = D8 ∪ (D8 + 1/2)."""
    whole, half = nearest_d8(x), nearest_d8(x - 0.5) + 0.5
    nearer = _squared(x - half) < _squared(x - whole)
    return jnp.where(nearer[..., None], half, whole)


def encode(x: Float[Array, "n 8"]) -> tuple[UInt16[Array, " n"], Float[Array, "n 8"]]:
    """The code of the nearest of E8P's 2^16 points, and the point."""
    (below, p), (above, q) = (_nearest_half(x - t) for t in (-0.25, 0.25))
    below, above = below - 0.25, above + 0.25
    minus = _squared(x - below) < _squared(x - above)
    point, row = jnp.where(minus[:, None], below, above), jnp.where(minus, p, q)
    # v = point - t has the signs of the point: magnitudes are 1/2 or more. The last sign is told
    # relative to what the row's parity asks of it, so that the bits of a whole v have an even sum.
    last = jnp.arange(8) == 7
    bits = (point < 0) ^ (last & jnp.asarray(_ODD)[row][:, None])
    signs = (bits.astype(jnp.int32) << _SIGN_BIT).sum(1) ^ minus.astype(jnp.int32)
    return (row << 8 | signs).astype(jnp.uint16), point


def decode(codes: UInt16[Array, "*n"]) -> Float[Array, "*n 8"]:
    """The points of E8P that codes stand for, in float32."""
    codes = codes.astype(jnp.int32)
    row, signs = codes >> 8, codes & 255
    minus = _bits(signs).sum(-1) % 2
    bits = _bits(signs ^ minus) ^ ((jnp.arange(8) == 7) & jnp.asarray(_ODD)[row][..., None])
    v = jnp.asarray(MAGNITUDES, jnp.float32)[row] * (1 - 2 * bits)
    return v + (0.25 - 0.5 * minus[..., None])


def encode_short(x: Float[Array, "n 8"]) -> tuple[UInt8[Array, " n"], Float[Array, "n 8"]]:
    """The index of the nearest of `SHORT_E8`, and the point."""
    table = jnp.asarray(SHORT_E8, x.dtype)
    codes = _argmax(2 * x @ table.T - (table**2).sum(1))
    return codes.astype(jnp.uint8), table[codes]


def decode_short(codes: UInt8[Array, "*n"]) -> Float[Array, "*n 8"]:
    return jnp.asarray(SHORT_E8, jnp.float32)[codes]


Residual = UInt8[Array, " n"] | UInt16[Array, " n"] | None


def approximate(
    x: Float[Array, "n 8"], bits: int
) -> tuple[tuple[UInt16[Array, " n"], Residual], Float[Array, "n 8"]]:
    """Codes of `bits` bits an entry, first and residual, and the points they stand for.

    E8P, then, for RESIDUAL_SCALE times what it leaves, `SHORT_E8` (3 bits) or E8P again (4 bits).
    """
    codes, point = encode(x)
    if bits == 2:
        return (codes, None), point
    scale = RESIDUAL_SCALE[bits]
    residual, finer = (encode_short if bits == 3 else encode)((x - point) * scale)
    return (codes, residual), point + finer / scale


def reconstruct(
    codes: UInt16[Array, "*n"],
    residual: Any,  # UInt8[Array, "*n"] | UInt16[Array, "*n"] | None
    bits: int,
) -> Float[Array, "*n 8"]:
    """The points of `approximate`, in float32."""
    point = decode(codes)
    if residual is None:
        return point
    return point + (decode_short if bits == 3 else decode)(residual) / RESIDUAL_SCALE[bits]


def _nearest_half(x: Float[Array, "n 8"]) -> tuple[Float[Array, "n 8"], Int[Array, " n"]]:
    """The nearest v of D8 + 1/2 with |v| in S, and the row of S.

    |x|² - |x - v|² = Σ 2 |x_i| a_i - a_i² if the signs of v = ± a are those of x. Where their
    number of minus signs is not what the row needs, the cheapest sign is turned.
    """
    table, magnitude = jnp.asarray(MAGNITUDES, x.dtype), jnp.abs(x)
    wrong = (x < 0).sum(1, keepdims=True) % 2 != jnp.asarray(_ODD)[None]
    products = [magnitude[:, i : i + 1] * table[None, :, i] for i in range(8)]
    turned = functools.reduce(jnp.minimum, products)
    score = 2 * magnitude @ table.T - (table**2).sum(1) - jnp.where(wrong, 4 * turned, 0)
    row = _argmax(score)
    a = table[row]
    cheapest = jnp.arange(8) == jnp.argmin(magnitude * a, 1, keepdims=True)
    turn = jnp.take_along_axis(wrong, row[:, None], 1) & cheapest
    return jnp.where((x < 0) ^ turn, -a, a), row


def _argmax(score: Float[Array, "n 256"]) -> Int[Array, " n"]:
    """The first of the largest of 256, in two steps of 16: XLA's argmax is far slower on a CPU."""
    score = score.reshape(-1, 16, 16)
    high = jnp.argmax(score.max(2), 1)
    low = jnp.argmax(jnp.take_along_axis(score, high[:, None, None], 1)[:, 0], 1)
    return 16 * high + low


def _bits(signs: Int[Array, "*n"]) -> Int[Array, "*n 8"]:
    """The bit of each entry's sign."""
    return signs[..., None] >> _SIGN_BIT & 1


def _squared(x: Float[Array, "*n 8"]) -> Float[Array, "*n"]:
    return (x**2).sum(-1)
