"""The bitshift trellis against brute force, the official arithmetic, and rate-distortion theory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from algorithms import trellis
from tests.algorithms.quantization import qtip_official as official

quantize = jax.jit(trellis.quantize, static_argnames="bits")
viterbi = jax.jit(trellis.viterbi, static_argnames="bits")


def sequences(seed, b, t):
    return np.random.default_rng(seed).normal(size=(b, t))


def random_levels(seed, state_bits):
    return np.random.default_rng(seed).normal(size=2**state_bits)


def is_a_walk(states, bits, state_bits):
    """Each state begins where the one before it, a step later, ends; the first after the last."""
    shared = 2 ** (state_bits - bits)
    return (states >> bits == np.roll(states, 1, axis=-1) % shared).all()


@functools.cache
def walks(state_bits, bits, t):
    """All of them, [n, t]: a stream of L + k (t - 1) bits has one."""
    total = state_bits + bits * (t - 1)
    streams = np.arange(2**total)[:, None]
    return (streams >> (total - state_bits - bits * np.arange(t))) % 2**state_bits


@pytest.mark.parametrize("code", ["1mad", "3inst"])
@pytest.mark.parametrize("state_bits", [8, 16])
def test_computed_codes_are_the_official_arithmetic(code, state_bits):
    """To the bit, but for the last one of 1mad's division, which is a product here."""
    reference = {"1mad": official.one_mad, "3inst": official.three_inst}[code]
    values = np.asarray(trellis.levels(code, state_bits))
    expected = np.array([reference(s) for s in range(2**state_bits)])
    assert values.dtype == np.float32
    if code == "1mad":
        np.testing.assert_allclose(values, expected, rtol=2e-7)
        values, expected = (np.round(v * 147.800537109375) for v in (values, expected))
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("code", trellis.CODES)
def test_states_decode_to_the_same_bits_jitted_or_not(code):
    states = jnp.arange(2**10).reshape(4, -1)
    jitted = jax.jit(lambda s: trellis.decode(s, code, 10))(states)
    np.testing.assert_array_equal(jitted, trellis.decode(states, code, 10))
    np.testing.assert_array_equal(jitted.reshape(-1), trellis.levels(code, 10))


@pytest.mark.parametrize("state_bits", [8, 11, 16])
def test_the_table_holds_every_quantile_once(state_bits):
    n = 2**state_bits
    values = np.sort(np.asarray(trellis.levels("lut", state_bits), np.float64))
    expected = scipy.stats.norm.ppf((np.arange(n) + 0.5) / n)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("code", trellis.CODES)
def test_neighbours_on_a_walk_have_values_of_nothing_in_common(code):
    """As draws would: a correlation of 2^12 pairs has a standard error of 1/64."""
    values = np.asarray(trellis.levels(code, 12), np.float64)
    shared = np.arange(2**12)
    for new in range(4):
        following = (shared << 2 | new) % 2**12
        assert abs(np.corrcoef(values[shared], values[following])[0, 1]) < 4 / 64


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("t", [1, 3, 6])
def test_viterbi_finds_the_best_of_all_walks(x64, bits, t):
    x, levels = sequences(t, 5, t), random_levels(bits, 4)
    every = walks(4, bits, t)
    costs = ((x[:, None] - levels[every]) ** 2).sum(-1)
    np.testing.assert_array_equal(viterbi(x, levels, bits), every[costs.argmin(1)])

    seam = np.arange(5) % 2 ** (4 - bits)
    ends = (every[:, :1] >> bits == seam) & (every[:, -1:] % 2 ** (4 - bits) == seam)
    held = np.where(ends.T, costs, np.inf)
    found = np.asarray(viterbi(x, levels, bits, seam))
    reachable = np.isfinite(held.min(1))  # a walk of one step cannot leave one seam for another
    assert reachable.all() or t * bits < 4 - bits
    np.testing.assert_array_equal(found[reachable], every[held.argmin(1)][reachable])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("code", trellis.CODES)
def test_quantize_is_the_official_one(x64, bits, code):
    levels = np.asarray(trellis.levels(code, 8), np.float64)
    x = sequences(bits, 3, 32)
    expected = [official.quantize(row, levels, bits) for row in x]
    np.testing.assert_array_equal(quantize(x, levels, bits), expected)


def test_the_batches_leave_no_trace(x64):
    levels, x = (
        random_levels(0, 8),
        sequences(1, 70, 16),
    )  # 70 sequences go as two batches of 40, padded
    whole = np.asarray(quantize(x, levels, 2))
    np.testing.assert_array_equal(whole[[0, 39, 40, 69]], quantize(x[[0, 39, 40, 69]], levels, 2))


@pytest.mark.parametrize("bits, state_bits", [(1, 4), (2, 6), (2, 8), (3, 8), (4, 8)])
def test_walks_bite_their_tail_at_little_cost(x64, bits, state_bits):
    """No better than the best seam, no worse than 1 % on average."""
    levels, x = random_levels(2, state_bits), sequences(3, 40, 32)
    states = np.asarray(quantize(x, levels, bits))
    assert is_a_walk(states, bits, state_bits)

    def cost(states):
        return ((x - levels[np.asarray(states)]) ** 2).sum(1)

    seams = range(2 ** (state_bits - bits))
    best = np.min([cost(viterbi(x, levels, bits, np.full(40, seam))) for seam in seams], axis=0)
    assert (cost(states) >= best - 1e-12).all()
    assert (best >= cost(viterbi(x, levels, bits)) - 1e-12).all()
    assert cost(states).sum() < 1.01 * best.sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("state_bits", [8, 12, 15, 16])
def test_every_stream_is_a_walk_and_every_walk_a_stream(bits, state_bits):
    """So kT bits are used to the last: 2^(kT) streams, as many walks that bite their tail."""
    rng = np.random.default_rng(bits)
    packed = jnp.asarray(rng.integers(0, 256, (3, 2, 4 * bits)), jnp.uint8)
    states = trellis.unpack(packed, bits, state_bits)
    assert states.shape == (3, 2, 32) and is_a_walk(np.asarray(states), bits, state_bits)
    np.testing.assert_array_equal(trellis.pack(states, bits, state_bits), packed)
    words = [official.pack_trellis(row, bits, state_bits) for row in np.asarray(states[0])]
    np.testing.assert_array_equal(packed[0], np.array(words).astype(">u2").view(np.uint8))


def test_each_state_has_as_many_that_lead_to_it_as_it_leads_to():
    """A window that slides along all streams of L + k bits meets each pair once."""
    pairs = walks(8, 2, 2)
    assert len(np.unique(pairs, axis=0)) == 2**10
    assert (np.bincount(pairs[:, 0]) == 4).all() and (np.bincount(pairs[:, 1]) == 4).all()


@functools.cache
def distortion(code, state_bits, bits, b=64, t=256):
    """Of standard normal draws, at the spread that QTIP uses."""
    levels = trellis.levels(code, state_bits)
    x = jnp.asarray(sequences(0, b, t), jnp.float32)
    unit = 0.9 * jnp.sqrt(jnp.mean(levels**2))
    return float(jnp.mean((levels[quantize(x * unit, levels, bits)] / unit - x) ** 2))


LLOYD_MAX = {2: 0.11748, 3: 0.03455, 4: 0.00950}  # of the best grids of 4, 8 and 16 points


@pytest.mark.parametrize("code", trellis.CODES)
def test_distortion_at_2_bits_is_close_to_the_bound(code):
    """2^-4 = 0.0625 is the least at any dimension; E8P of QuIP# has 0.091."""
    assert 0.0625 < distortion(code, 10, 2) < 0.085 < LLOYD_MAX[2]
    assert distortion(code, 10, 2) < 0.95 * distortion(code, 8, 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_is_below_that_of_the_best_scalar_grid(bits):
    assert 4.0**-bits < distortion("3inst", 10, bits) < 0.75 * LLOYD_MAX[bits]


@pytest.mark.parametrize(
    "length, bits, state_bits, sentence",
    [
        (256, 2, 7, "state_bits=7 must be from 8 to 16"),
        (256, 2, 17, "state_bits=17 must be from 8 to 16"),
        (6, 2, 8, "6 steps of bits=2 does not fill whole bytes"),
        (4, 2, 12, "4 steps of bits=2 is shorter than state_bits=12"),
    ],
)
def test_walks_that_cannot_be_are_refused(length, bits, state_bits, sentence):
    with pytest.raises(ValueError, match=sentence):
        trellis.check(length, bits, state_bits)
