"""Small floats against ml_dtypes, exact fractions, and the constants of bitsandbytes.

The thresholds of NF4 are those of `dQuantizeNF4` in csrc/kernels.cu, its construction that of
`create_normal_map` in bitsandbytes/functional.py, and the ties those of the first; both from
github.com/bitsandbytes-foundation/bitsandbytes at c037a306e97ced3c452570132f66aac4e2964056, MIT
licence. ml_dtypes casts without saturating, so it judges magnitudes up to the peak alone.
"""

import bisect
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from algorithms.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    MINIFLOATS,
    NF4_LEVELS,
    Minifloat,
    decode_levels,
    decode_power,
    encode_levels,
    encode_power,
    mx_scale,
)

ORACLES = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E3M2: ml_dtypes.float6_e3m2fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E2M1: ml_dtypes.float4_e2m1fn,
}
formats = pytest.mark.parametrize("form", ORACLES, ids=lambda form: form.name)

NF4_THRESHOLDS = np.array(
    [
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
        *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
        *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683),
        *(0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
    ],
    np.float32,
)


def words(x):
    """The bits of float32 numbers, by which -0 is not 0 and a NaN equals itself."""
    return np.asarray(x, np.float32).view(np.uint32)


def floats(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def codes(form):
    return np.arange(2**form.bits, dtype=np.uint8)


def numbers(form):
    """The finite values of the format in increasing order, as ml_dtypes has them; zero once."""
    values = codes(form).view(ORACLES[form]).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def official_codes(form, x):
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(ORACLES[form]).view(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def encode(form, x):
    return form.encode(x)


@functools.partial(jax.jit, static_argnums=0)
def rounding(form, x):
    return form.round(x)


def encoded(form, x):
    return np.asarray(encode(form, x))


def rounded(form, x):
    return np.asarray(rounding(form, x))


def every_kind_of_float32(count, seed=0):
    """Random bits: all exponents alike, so denormals, infinities and NaN too."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, count, np.uint32)
    bits[::16] &= 0x807FFFFF  # denormals
    bits[1::4] = bits[1::4] & 0x83FFFFFF | 0x3C000000  # 2^-7 to 2: where formats live
    bits[2::4] = bits[2::4] & 0x83FF0000 | 0x40000000  # 2 to 2^9, with ties
    return floats(bits)


@formats
def test_decodes_every_code_bit_for_bit(form):
    mine = form.decode(jnp.asarray(codes(form)))
    assert mine.dtype == jnp.float32
    theirs = codes(form).view(ORACLES[form]).astype(np.float32)
    np.testing.assert_array_equal(words(mine), words(theirs))


@formats
def test_encodes_every_number_as_its_code(form):
    values = codes(form).view(ORACLES[form]).astype(np.float32)
    finite = np.isfinite(values)
    mine = encoded(form, values)
    assert mine.dtype == np.uint8
    np.testing.assert_array_equal(mine[finite], codes(form)[finite])


@pytest.mark.parametrize(
    "form, bits, peak, peak_exponent, smallest, count",
    [  # as OFP8 v1.0 and MX v1.0 publish them; count: of different finite numbers
        (E4M3, 8, 448, 8, 2**-9, 253),
        (E5M2, 8, 57344, 15, 2**-16, 247),
        (E3M2, 6, 28, 4, 2**-4, 63),
        (E2M3, 6, 7.5, 2, 2**-3, 63),
        (E2M1, 4, 6, 2, 2**-1, 15),
    ],
)
def test_published_properties(form, bits, peak, peak_exponent, smallest, count):
    assert (form.bits, form.peak, form.peak_exponent) == (bits, peak, peak_exponent)
    assert (form.smallest, len(numbers(form))) == (smallest, count)
    reached = rounded(form, every_kind_of_float32(100_000))
    finite = reached[np.isfinite(reached)]
    assert set(finite.tolist()) == set(numbers(form).tolist())  # each is reached, nothing else
    assert MINIFLOATS[form.name] is form


@formats
def test_midpoints_are_ties_to_even_and_their_neighbours_are_not(form):
    grid = numbers(form)
    middle = (grid[:-1] + grid[1:]) / 2  # exact: float32 has bits to spare
    below, above = (np.nextafter(middle, np.float32(s * np.inf)) for s in (-1, 1))
    for x in (middle, below, above):
        np.testing.assert_array_equal(encoded(form, x), official_codes(form, x))

    np.testing.assert_array_equal(rounded(form, below), grid[:-1])
    np.testing.assert_array_equal(rounded(form, above), grid[1:])
    assert (encoded(form, middle) % 2 == 0).all()


@formats
def test_equals_the_cast_of_ml_dtypes_on_every_sixteen_leading_bits(form):
    """Each with a tail of zeros, of one, of half and of ones: every sign, exponent and rounding."""
    lead = np.arange(2**16, dtype=np.uint32)[:, None] << 16
    x = floats(lead | np.array([0, 1, 0x8000, 0xFFFF], np.uint32)).ravel()
    x = x[np.abs(x) <= form.peak]
    assert len(x) > 100_000
    np.testing.assert_array_equal(encoded(form, x), official_codes(form, x))


def magnitudes(form):
    """The value of each code without sign, by the definition in exact fractions, to the peak."""
    b, m = 2 ** (form.exponent - 1) - 1, 2**form.mantissa
    grid = [Fraction(0)]
    while grid[-1] < form.peak:
        e, f = divmod(len(grid), m)
        grid.append(Fraction(f if e == 0 else m + f, m) * Fraction(2) ** (max(e, 1) - b))
    return grid


def nearest(grid, x):
    """What one finite float32 is rounded to: the nearest magnitude, of two the even code."""
    magnitude = min(abs(Fraction(float(x))), grid[-1])
    at = bisect.bisect_left(grid, magnitude)
    near = [n for n in (at - 1, at) if 0 <= n < len(grid)]
    best = min(near, key=lambda n: (abs(grid[n] - magnitude), n % 2))
    return np.copysign(np.float32(grid[best]), x)


@formats
def test_equals_exact_fractions_on_random_bits(form):
    x = every_kind_of_float32(1500, seed=1)
    x = np.concatenate([x, floats([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF])])
    x = np.concatenate([x, -x])
    x = x[np.isfinite(x)]
    grid = magnitudes(form)
    expected = np.array([nearest(grid, value) for value in x])
    np.testing.assert_array_equal(words(rounded(form, x)), words(expected))


@formats
def test_saturates_and_keeps_nan_where_there_is_one(form):
    beyond = np.nextafter(np.float32(form.peak), np.float32(np.inf))
    big = np.array([form.peak, beyond, 2 * form.peak, 3e38, np.inf], np.float32)
    for sign in (1, -1):
        np.testing.assert_array_equal(rounded(form, sign * big), np.full(5, sign * form.peak))

    nan = floats([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF])
    if form.special == "none":
        expected = np.array([1, -1, 1, -1]) * form.peak
        np.testing.assert_array_equal(rounded(form, nan), expected)
    else:
        np.testing.assert_array_equal(encoded(form, nan[:2]), official_codes(form, nan[:2]))
        assert np.isnan(rounded(form, nan)).all()


@formats
def test_jit_equals_eager(form):
    x = jnp.asarray(every_kind_of_float32(4096, seed=2).reshape(8, 16, 32))
    assert jax.jit(form.encode)(x).shape == x.shape
    np.testing.assert_array_equal(jax.jit(form.encode)(x), form.encode(x))
    np.testing.assert_array_equal(words(jax.jit(form.round)(x)), words(form.round(x)))
    np.testing.assert_array_equal(
        words(jax.jit(form.decode)(form.encode(x))), words(form.decode(form.encode(x)))
    )


@formats
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_floats_are_rounded_once_and_keep_their_dtype(form, dtype):
    x = jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)))
    narrow = rounding(form, x)
    assert narrow.dtype == x.dtype
    wide = rounded(form, x.astype(jnp.float32))
    finite = ~np.isnan(wide)
    np.testing.assert_array_equal(words(narrow.astype(jnp.float32))[finite], words(wide)[finite])
    np.testing.assert_array_equal(jnp.isnan(narrow), ~finite)


@formats
def test_bits_above_the_code_are_ignored(form):
    stray = codes(form) | np.uint8((0xFF << form.bits) & 0xFF)
    mine = form.decode(jnp.asarray(stray))
    np.testing.assert_array_equal(words(mine), words(form.decode(jnp.asarray(codes(form)))))


def test_has_the_gradient_of_rounding():
    gradient = jax.grad(lambda x: E4M3.round(x).sum())(jnp.linspace(-2.0, 500.0, 7))
    np.testing.assert_array_equal(gradient, np.zeros(7))


@pytest.mark.parametrize("coarse, fine", [(E2M1, E2M3), (E2M1, E3M2), (E3M2, E4M3)])
def test_more_bits_are_nearer(coarse, fine):
    """To normally distributed numbers, scaled as each format would have them."""
    x = jax.random.normal(jax.random.key(0), (4096,))
    x = x / jnp.abs(x).max()

    def error(form):
        return jnp.sum((form.round(x * form.peak) / form.peak - x) ** 2)

    assert error(fine) < 0.5 * error(coarse)


def test_decodes_every_power():
    """Code 0 included, which is a denormal, also when compiled."""
    every = np.arange(256, dtype=np.uint8)
    theirs = words(every.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    for decode in (decode_power, jax.jit(decode_power)):
        np.testing.assert_array_equal(words(decode(jnp.asarray(every))), theirs)


def test_encodes_every_power_as_its_code():
    values = floats(np.r_[1 << 22, np.arange(1, 255) << 23])
    np.testing.assert_array_equal(encode_power(jnp.asarray(values)), np.arange(255))


def test_encodes_the_nearest_power():
    """As ml_dtypes does for float32's normal numbers, ties to the larger; mistakes are NaN."""
    x = floats(np.arange(2**23, 2**31, 2**14 - 1))
    ties = floats(np.arange(1, 255) * 2**23 + 2**22)
    beside = [np.nextafter(ties, np.float32(s * np.inf)) for s in (-1, 1)]
    x = np.concatenate([x, ties, *beside])
    x = np.concatenate([x[(x <= 2.0**127) | ~np.isfinite(x)], -x])
    theirs = official_codes_of_powers(x)
    for encode in (encode_power, jax.jit(encode_power)):
        np.testing.assert_array_equal(encode(jnp.asarray(x)), theirs)


def test_encodes_denormals_as_the_nearest_power():
    """The middle of 2^-127 and 2^-126 decides, where ml_dtypes rounds up all above 2^-127."""
    x = floats([1, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF])
    powers = floats([0x400000, 0x800000]).astype(np.float64)
    middle = powers.mean()
    np.testing.assert_array_equal(encode_power(jnp.asarray(x)), x.astype(np.float64) >= middle)
    np.testing.assert_array_equal(official_codes_of_powers(x), x.astype(np.float64) > powers[0])


def official_codes_of_powers(x):
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)


def test_powers_saturate_where_ml_dtypes_gives_nan():
    x = np.array([0.0, -0.0, 3.0e38], np.float32)
    assert (official_codes_of_powers(x) == 255).all()
    np.testing.assert_array_equal(encode_power(jnp.asarray(x)), [0, 0, 254])


@formats
def test_the_scale_of_mx_is_the_standard_rule(form):
    absmax = np.abs(every_kind_of_float32(3000, seed=3))
    absmax = absmax[np.isfinite(absmax) & (absmax > 0)]
    scale = np.asarray(mx_scale(jnp.asarray(absmax), form.peak_exponent))
    _, e = np.frexp(absmax.astype(np.float64))  # exact: float64 has no denormal here
    expected = np.clip(e - 1 - form.peak_exponent, -126, 127)
    np.testing.assert_array_equal(scale, np.exp2(expected.astype(np.float64)))
    np.testing.assert_array_equal(scale, decode_power(encode_power(jnp.asarray(scale))))
    live = expected > -126
    assert live.any() and not live.all()
    largest = absmax[live] / scale[live].astype(np.float64)
    unit = 2.0**form.peak_exponent
    assert (largest >= unit).all() and (largest < 2 * unit).all()


def test_the_scale_of_mx_at_its_ends():
    x = np.array([0.0, 1e-45, 2.0**-126, 3.4e38, -8.0, np.inf, np.nan], np.float32)
    small = 2.0**-126
    for scale in (mx_scale, jax.jit(mx_scale, static_argnums=1)):
        first = scale(jnp.asarray(x), 0)
        np.testing.assert_array_equal(first[:5], [small, small, small, 2.0**127, 8])
        second = scale(jnp.asarray(x), 8)
        np.testing.assert_array_equal(second[:5], [small, small, small, 2.0**119, 2.0**-5])
        assert jnp.isnan(first[5:]).all() and jnp.isnan(second[5:]).all()


@formats
def test_a_group_of_zeros_stays_zeros_and_a_tiny_one_stays_finite(form):
    groups = jnp.asarray(np.array([[0, 0], [1e-40, -1e-42], [3e-38, 1e-38], [3e38, 1]], np.float32))

    @jax.jit
    def approximate(x):
        scale = mx_scale(jnp.abs(x).max(-1), form.peak_exponent)[:, None]
        return form.round(x / scale) * scale

    result = np.asarray(approximate(groups))
    assert np.isfinite(result).all() and not result[0].any()
    assert np.abs(result[3, 0] / 3e38 - 1) < 0.2


def test_nf4_is_its_published_construction():
    """Eight quantiles above zero, seven below, evenly spaced in probability, scaled to one."""
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    built = np.sort(np.concatenate([below, [0], above])) / above.max()
    np.testing.assert_allclose(NF4_LEVELS, built, rtol=0, atol=1e-6)
    assert NF4_LEVELS[0] == -1 and NF4_LEVELS[7] == 0 and NF4_LEVELS[15] == 1


def test_nf4_codes_are_those_of_bitsandbytes():
    """At every threshold and beside it: the levels are exact if their midpoints are theirs."""
    np.testing.assert_array_equal((NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2, NF4_THRESHOLDS)
    rng = np.random.default_rng(4)
    beside = [np.nextafter(NF4_THRESHOLDS, np.float32(s)) for s in (-9, 9)]
    edges = np.array([-np.inf, -2, -1, 0, 1, 2, np.inf, np.nan], np.float32)
    uniform = rng.uniform(-1, 1, 1000).astype(np.float32)
    x = np.concatenate([NF4_THRESHOLDS, *beside, edges, uniform])
    expected = [sum(value > t for t in NF4_THRESHOLDS) for value in x]
    for encode in (encode_levels, jax.jit(encode_levels)):
        mine = encode(jnp.asarray(x), jnp.asarray(NF4_LEVELS))
        assert mine.dtype == jnp.uint8
        np.testing.assert_array_equal(mine, expected)


def test_levels_are_the_nearest_and_come_back():
    levels = jnp.asarray([-3.0, -0.5, 0.0, 0.25, 9.0])
    x = jax.random.normal(jax.random.key(1), (7, 3, 5)) * 3
    closest = jnp.argmin(jnp.abs(x[..., None] - levels.reshape(1, 1, 1, 5)), -1)
    indices = encode_levels(x, levels)
    np.testing.assert_array_equal(indices, closest)
    np.testing.assert_array_equal(decode_levels(indices, levels), levels[closest])
    np.testing.assert_array_equal(encode_levels(levels, levels), np.arange(5))
    np.testing.assert_array_equal(encode_levels(NF4_LEVELS + jnp.zeros(()), NF4_LEVELS), range(16))


def test_256_levels_fit():
    levels = jnp.linspace(-1.0, 1.0, 256)
    np.testing.assert_array_equal(encode_levels(levels, levels), np.arange(256))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(exponent=1, mantissa=2), "exponent=1 and mantissa=2 must be at least 2 and 1"),
        (dict(exponent=4, mantissa=0), "mantissa=0"),
        (dict(exponent=5, mantissa=3), "8 bits at most"),
        (dict(exponent=4, mantissa=3, special="inf"), "special='inf' must be none, nan or ieee"),
    ],
)
def test_refuses_formats_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Minifloat("x", **options)


def test_refuses_what_it_cannot_round_exactly():
    with jax.enable_x64(True), pytest.raises(ValueError, match="must be float32 or a narrower"):
        E4M3.encode(jnp.ones(3, jnp.float64))
    with pytest.raises(ValueError, match="peak_exponent=-1 must not be negative"):
        mx_scale(jnp.ones(3), -1)
    for k in (1, 257):
        with pytest.raises(ValueError, match="levels must be 2 to 256 numbers"):
            encode_levels(jnp.ones(3), jnp.arange(k, dtype=jnp.float32))


def test_every_other_format_is_a_format_too():
    """IEEE-like E3M4 and E4M3, which ml_dtypes has: nothing is made for the five alone."""
    for form, oracle in (
        (Minifloat("e3m4", 3, 4, "ieee"), ml_dtypes.float8_e3m4),
        (Minifloat("e4m3", 4, 3, "ieee"), ml_dtypes.float8_e4m3),
    ):
        theirs = codes(form).view(oracle).astype(np.float32)
        np.testing.assert_array_equal(words(form.decode(jnp.asarray(codes(form)))), words(theirs))
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(encoded(form, theirs)[finite], codes(form)[finite])


def test_the_graph_does_not_grow_with_width():
    def size(function, n):
        return len(jax.make_jaxpr(function)(jax.ShapeDtypeStruct((4, n), jnp.float32)).jaxpr.eqns)

    for function in (E4M3.round, encode_power, lambda x: encode_levels(x, NF4_LEVELS)):
        assert size(function, 8) == size(function, 800) < 100
