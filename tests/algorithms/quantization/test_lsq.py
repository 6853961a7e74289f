"""Learned steps against ports of the published codes, their theory, and rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import formats
from algorithms.elements import Integer
from algorithms.formats import Format, integer
from algorithms.quantization.lsq import lsq, lsq_plus
from algorithms.tensors.quantized import load_scale
from tests.algorithms.quantization import lsq_official as official
from tests.algorithms.quantization.learned_layers import dense, fit, gradients, layer, loss, updated


@dataclasses.dataclass(frozen=True, kw_only=True)
class RealOffset(Integer):
    """Whose zero point is stored as it is: LSQ+'s offset, without deviation 2."""

    zero_dtype: str = "float16"

    def zero(self, low, scale):
        return -low / scale


def output_slope(rounded, x, y):
    """∂L/∂Ŵ of the mean squared error of x Ŵᵀ against y."""
    return 2 / y.size * (x @ rounded.T - y).T @ x


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_takes_the_steps_of_the_published_code(x64, bits):
    w, x, y = layer(bits)
    format = integer(bits=bits, group_size=None, symmetric=True, scale_dtype=None)
    made, rate = lsq(format=format).make(dense(w), jax.random.key(0)), 0.2
    s = first = official.init_from(w, bits)
    for _ in range(15):
        np.testing.assert_allclose(made.kernel[...].T, w, atol=1e-11)
        np.testing.assert_allclose(made.rounding.step[...], s, atol=1e-11)
        rounded = official.lsq(w, s, w, bits, w.shape[1])[0]
        _, by_w, by_s = official.lsq(w, s, output_slope(rounded, x, y), bits, w.shape[1])
        w, s = w - rate * by_w, s - rate * by_s
        updated(made, jnp.asarray(x), jnp.asarray(y), rate)
    assert np.abs(s - first).max() > 1e-3


@pytest.mark.parametrize("bits", [2, 4])
def test_takes_the_steps_of_the_published_offsets(x64, bits):
    w, x, y = layer(bits)
    format = Format(element=RealOffset(bits=bits), columns=None, scale_dtype=None)
    made, rate = lsq_plus(format=format).make(dense(w), jax.random.key(0)), 0.2
    s, beta = (np.asarray(p[...]) for p in (made.rounding.step, made.rounding.low))
    size = np.abs(np.stack([w.mean(1) - 3 * w.std(1), w.mean(1) + 3 * w.std(1)])).max(0)
    np.testing.assert_allclose(s[:, 0], size / 2 ** (bits - 1), rtol=1e-12)
    first = beta
    for _ in range(15):
        rounded = official.lsq_plus(w, s, beta, w, bits, w.shape[1])[0]
        slope = output_slope(rounded, x, y)
        _, by_w, by_s, by_beta = official.lsq_plus(w, s, beta, slope, bits, w.shape[1])
        w, s, beta = w - rate * by_w, s - rate * by_s, beta - rate * by_beta
        updated(made, jnp.asarray(x), jnp.asarray(y), rate)
        np.testing.assert_allclose(made.kernel[...].T, w, atol=1e-11)
        np.testing.assert_allclose(made.rounding.step[...], s, atol=1e-11)
        np.testing.assert_allclose(made.rounding.low[...], beta, atol=1e-11)
    assert np.abs(beta - first).max() > 1e-4


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.some(1)
def test_inputs_take_the_steps_of_the_published_code(bits):
    """In float32, as they are stored; N is the number of channels."""
    w, x, y = layer(bits)
    made = lsq(format=integer(bits=8, group_size=32), input_bits=bits).make(
        dense(np.float32(w)), jax.random.key(0)
    )
    weight, rate = made.finished, 0.02
    s = first = official.init_from(x.reshape(1, -1), bits)
    for _ in range(10):
        now = np.asarray(made.rounding.dense(made.kernel[...].T), np.float64)
        rounded = official.lsq(x.reshape(1, -1), s, 0 * x.reshape(1, -1), bits, 1)[0]
        upstream = 2 / y.size * (rounded.reshape(x.shape) @ now.T - y) @ now
        by_s = official.lsq(x.reshape(1, -1), s, upstream.reshape(1, -1), bits, x.shape[1])[2]
        s = s - rate * by_s
        updated(made, jnp.float32(x), jnp.float32(y), rate)
        np.testing.assert_allclose(weight().scale, s, rtol=2e-5)
    assert np.abs(s - first).max() > 1e-4


def test_an_offset_of_inputs_begins_at_what_the_first_batch_covers():
    w, x, _ = layer()
    x = jnp.float32(np.abs(x) + 1)
    made = lsq_plus(format=integer(bits=8, group_size=32), input_bits=4).make(
        dense(np.float32(w)), jax.random.key(0)
    )
    with pytest.raises(ValueError, match="train a step first"):
        made.finished()
    first = made(x)
    made(100 * x)  # later batches move nothing
    np.testing.assert_array_equal(made(x), first)
    found = made.finished()
    np.testing.assert_allclose(found.scale * 15, x.max(), rtol=1e-6)  # zero is on the grid
    np.testing.assert_allclose(found.rounded(x), x, atol=float(x.max()) / 30 + 1e-5)


@pytest.mark.parametrize("offset", [False, True])
def test_gradients_of_steps_with_fixed_codes_are_those_of_finite_differences(x64, offset):
    """ŵ = s (q - z) is smooth in s where no code changes: inside, LSQ adds what moving w would."""
    w, x, y = (jnp.asarray(a) for a in layer(3))
    w = w + jnp.sign(w)  # far enough from zero for every weight to be clipped
    format = Format(element=RealOffset(bits=3), columns=None, scale_dtype=None)
    method = lsq_plus if offset else lsq
    made = method(format=format).make(dense(w), jax.random.key(0))
    made.rounding.step.set_value(0.01 * made.rounding.step[...])
    found = gradients(made, x, y)["rounding"]["step"][...]
    g, e = 1 / np.sqrt(32 * (7 if offset else 3)), 1e-6
    for row in range(3):
        ends = []
        for sign in (1, -1):
            moved = made.rounding.step[...].at[row].add(sign * e)
            other = nnx.clone(made)
            other.rounding.step.set_value(moved)
            ends.append(loss(other, x, y))
        np.testing.assert_allclose(found[row, 0], g * (ends[0] - ends[1]) / (2 * e), rtol=1e-5)


@pytest.mark.parametrize(
    "format", [integer(bits=2, group_size=16, symmetric=True), integer(bits=2, group_size=16),
               formats.nf4(group_size=16), formats.nvfp4()], ids=str
)  # fmt: skip
@pytest.mark.some(2)
def test_a_learned_layer_loses_less_than_rounding(format):
    w, x, y = (jnp.float32(a) for a in layer(1, n=200))
    rounded = format.quantize(w).dequantize()
    plain = jnp.mean((x @ rounded.T - y) ** 2)
    made = lsq_plus(format=format).make(dense(w), jax.random.key(0))
    _, last = fit(made, x, y, 1e-2)
    assert last < (0.6 if format.bits == 2 else 1) * plain  # little is left to win of four bits
    np.testing.assert_allclose(made.finished().matmul(x), made(x), atol=1e-5)


def test_the_divisor_of_nested_scales_makes_room_for_larger_steps():
    w, *_ = layer(2)
    made = lsq(format=formats.nvfp4()).make(dense(np.float32(w)), jax.random.key(0))
    before = made.finished()
    made.rounding.step.set_value(10 * made.rounding.step[...])
    after = made.finished()
    np.testing.assert_allclose(after.scale.astype("float32").max(), 448)
    np.testing.assert_allclose(after.divisor, before.divisor / 10, rtol=0.05)
    worth, first = (load_scale(t.scale, t.divisor) for t in (after, before))
    np.testing.assert_allclose(worth, 10 * first, rtol=0.07)  # as E4M3 rounds


def test_a_layer_of_zeros_stays_one():
    zeros = jnp.zeros((4, 32))
    for method in (lsq, lsq_plus):
        made = method(format=integer(bits=3, group_size=16)).make(dense(zeros), jax.random.key(0))
        assert not made.finished().dequantize().any()
        found = gradients(made, jnp.ones((2, 32)), jnp.ones((2, 4)))
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found))


def test_refuses_ranges_that_are_not_of_single_rows():
    with pytest.raises(ValueError, match="rows=None"):
        lsq(format=formats.fp8(rows=None))
