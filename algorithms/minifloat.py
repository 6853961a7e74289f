"""Small floats, bit by bit: FP8, FP6, FP4, the power-of-two scale E8M0, and tables such as NF4.

FP8: Micikevicius et al., arXiv:2209.05433, and OCP 8-bit Floating Point Specification v1.0.
FP6, FP4, E8M0: OCP Microscaling Formats (MX) Specification v1.0, arXiv:2310.10537.
NF4: Dettmers, Pagnoni, Holtzman, Zettlemoyer, NeurIPS 2023, arXiv:2305.14314.

A code is a sign s, E bits of exponent e and M bits of mantissa m. With bias b = 2^(E-1) - 1:
    (-1)^s 2^(e-b) (1 + m / 2^M)  where e > 0,    (-1)^s 2^(1-b) m / 2^M  where e = 0.

Everything is integer arithmetic on float32's own bits. Floats would not do: XLA on a CPU takes
float32 denormals for zero, and its log2 and exp2 are not exact.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8, UInt32

_INFINITY, _NAN = 0x7F800000, 0x7FC00000  # of float32
_MAGNITUDE = 0x7FFFFFFF  # of float32: everything but the sign
_ONE = 1 << 23  # float32's hidden bit, and one step of its exponent


@dataclasses.dataclass(frozen=True)
class Minifloat:
    """A signed float of at most 8 bits.

    special: which codes are not numbers. "none": no code; "nan": the last one of each sign, as in
    E4M3 of OCP; "ieee": the largest exponent is infinity (m = 0) and NaN.
    """

    name: str
    exponent: int  # bits
    mantissa: int  # bits
    special: str = "none"

    def __post_init__(self) -> None:
        if self.exponent < 2 or self.mantissa < 1 or self.bits > 8:
            raise ValueError(
                f"exponent={self.exponent} and mantissa={self.mantissa} must be at least 2 and 1, "
                "and make 8 bits at most with the sign."
            )
        if self.special not in ("none", "nan", "ieee"):
            raise ValueError(f"special={self.special!r} must be none, nan or ieee.")

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def peak(self) -> float:
        """The largest finite magnitude."""
        fraction = self._peak_code % 2**self.mantissa / 2**self.mantissa
        return 2.0**self.peak_exponent * (1 + fraction)

    @property
    def peak_exponent(self) -> int:
        """floor(log2(peak)), which OCP MX calls emax."""
        return (self._peak_code >> self.mantissa) - self.bias

    @property
    def smallest(self) -> float:
        """The smallest magnitude above zero, a subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def _peak_code(self) -> int:
        if self.special == "ieee":
            return ((2**self.exponent - 1) << self.mantissa) - 1
        return 2 ** (self.bits - 1) - (2 if self.special == "nan" else 1)

    @property
    def _nan_code(self) -> int:
        """The quiet NaN that casts of ml_dtypes give."""
        if self.special == "ieee":
            return self._peak_code + 1 + 2 ** (self.mantissa - 1)
        return self._peak_code + 1

    def round(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The nearest number of the format, ties to even, in x's dtype, which holds it exactly.

        Magnitudes above the peak, infinity included, become the peak. NaN stays NaN where the
        format has one; elsewhere it becomes the peak with NaN's sign, as infinity would. The
        gradient is zero, as that of jnp.round. Raises ValueError for a dtype of more than 32 bits.
        """
        return self.decode(self.encode(x)).astype(x.dtype)

    def encode(self, x: Float[Array, "*s"]) -> UInt8[Array, "*s"]:
        """The code of `round(x)`, in the low `bits` bits."""
        word = _word(x)
        magnitude = word & _MAGNITUDE
        code = jnp.minimum(self._round_word(magnitude), self._peak_code)
        if self.special != "none":
            code = jnp.where(magnitude > _INFINITY, self._nan_code, code)
        return (code | (word >> 31 << (self.bits - 1))).astype(jnp.uint8)

    def _round_word(self, magnitude: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
        """The code of a float32 given by its bits, as if the format had no largest exponent.

        A code counts steps from zero: steps of 2^(1-b-M) up to the second exponent, then twice as
        long at each exponent. So a mantissa that rounds up to 2 carries into the exponent.
        """
        e, first = magnitude >> 23, 128 - self.bias  # biased as float32's; the subnormals' own
        significand = magnitude % _ONE + _ONE  # wrong for denormals, which all become zero
        binade = jnp.maximum(e, first) - first
        shift = jnp.minimum(23 - self.mantissa + first + binade - e, 25)  # 25 leaves nothing
        odd = significand >> shift & 1
        half = jnp.uint32(1) << (shift - 1)
        return (binade << self.mantissa) + ((significand + half - 1 + odd) >> shift)

    def decode(self, codes: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
        """The exact float32 value of every code; bits above the low `bits` are ignored."""
        word = codes.astype(jnp.uint32)
        magnitude = word & (2 ** (self.bits - 1) - 1)
        normal = (magnitude << (23 - self.mantissa)) + ((127 - self.bias) << 23)
        subnormal = lax.bitcast_convert_type(magnitude * jnp.float32(self.smallest), jnp.uint32)
        value = jnp.where(magnitude < 2**self.mantissa, subnormal, normal)
        if self.special != "none":
            infinite = (self.special == "ieee") & (magnitude == self._peak_code + 1)
            special = jnp.where(infinite, jnp.uint32(_INFINITY), jnp.uint32(_NAN))
            value = jnp.where(magnitude > self._peak_code, special, value)
        return _float(value | (word >> (self.bits - 1) << 31))


E4M3 = Minifloat("e4m3", 4, 3, "nan")  # FP8 for weights and activations, to 448
E5M2 = Minifloat("e5m2", 5, 2, "ieee")  # FP8 for gradients, to 57344
E3M2 = Minifloat("e3m2", 3, 2)  # FP6, to 28
E2M3 = Minifloat("e2m3", 2, 3)  # FP6, to 7.5
E2M1 = Minifloat("e2m1", 2, 1)  # FP4, to 6
MINIFLOATS = {form.name: form for form in (E4M3, E5M2, E3M2, E2M3, E2M1)}


def encode_power(x: Float[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The E8M0 code of the nearest power of two, a tie to the larger: x = 2^(code - 127).

    E8M0 has neither zero nor infinity. Zero and what lies below 2^-127 become 2^-127, finite
    values above 2^127 become 2^127; a negative, infinite or NaN scale is a mistake, and NaN (0xFF).
    """
    word = _word(x)
    magnitude = word & _MAGNITUDE
    nearest = jnp.where(magnitude < _ONE, magnitude >= _ONE // 4 * 3, (magnitude + _ONE // 2) >> 23)
    mistake = (magnitude >= _INFINITY) | (word > _MAGNITUDE) & (magnitude > 0)
    return jnp.where(mistake, 255, jnp.minimum(nearest, 254)).astype(jnp.uint8)


def decode_power(codes: UInt8[Array, "*s"]) -> Float[Array, "*s"]:
    """2^(code - 127) in float32, exactly; NaN for 0xFF.

    Code 0 is 2^-127, a denormal: its bits are right, but XLA on a CPU computes with it as with
    zero. `mx_scale` never gives it.
    """
    word = codes.astype(jnp.uint32)
    word = jnp.where(word == 0, _ONE // 2, jnp.where(word == 255, jnp.uint32(_NAN), word << 23))
    return _float(word)


def mx_scale(absmax: Float[Array, "*s"], peak_exponent: int) -> Float[Array, "*s"]:
    """The shared scale of OCP MX v1.0 in float32: 2^(floor(log2(absmax)) - peak_exponent).

    peak_exponent: of the elements' format. Their largest may exceed its peak, and saturates.

    Clamped to [2^-126, 2^127] where the standard says 2^-127: that one is a denormal, by which
    XLA on a CPU divides as by zero. A group of zeros has the smallest scale. Infinity and NaN give
    NaN.
    """
    if peak_exponent < 0:
        raise ValueError(f"peak_exponent={peak_exponent} must not be negative.")
    magnitude = _word(absmax) & _MAGNITUDE
    # A denormal absmax reads as 2^-127, whatever its leading bit: either way it is clamped.
    code = jnp.maximum(magnitude >> 23, 1 + peak_exponent) - peak_exponent
    return _float(jnp.where(magnitude >= _INFINITY, jnp.uint32(_NAN), code << 23))


# Quantiles of a normal distribution, scaled to [-1, 1]: seven below zero, zero, eight above.
# The float32 numbers of bitsandbytes; a NumPy array, so that importing this starts no device.
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
NF4_LEVELS.setflags(write=False)


def encode_levels(
    x: Float[Array, "*s"], levels: Float[Array | np.ndarray, " k"]
) -> UInt8[Array, "*s"]:
    """The index of the nearest of k increasing levels, a tie to the lower, as bitsandbytes does.

    NaN gives 0, there as here. Raises ValueError unless 2 <= k <= 256.
    """
    k = levels.shape[0]
    if not 2 <= k <= 256:
        raise ValueError(f"levels must be 2 to 256 numbers, {levels.shape=}.")
    levels = jnp.asarray(levels)
    midpoints = (levels[:-1] + levels[1:]) / 2
    above = x[..., None] > midpoints.reshape((1,) * x.ndim + (k - 1,))
    return above.sum(-1, dtype=jnp.uint8)


def decode_levels(
    codes: UInt8[Array, "*s"], levels: Float[Array | np.ndarray, " k"]
) -> Float[Array, "*s"]:
    """The level of each code, in levels' dtype."""
    return jnp.asarray(levels)[codes]


def _word(x: Float[Array, "*s"]) -> UInt32[Array, "*s"]:
    """The bits of x as float32; raises ValueError if float32 does not hold x exactly."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        raise ValueError(
            f"{x.dtype=} must be float32 or a narrower float: to round twice is not to round once, "
            "so cast to float32 yourself if that is what you want."
        )
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)


def _float(word: UInt32[Array, "*s"]) -> Float[Array, "*s"]:
    return lax.bitcast_convert_type(word, jnp.float32)
