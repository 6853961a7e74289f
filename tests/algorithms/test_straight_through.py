import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats, straight_through
from algorithms.formats import integer
from algorithms.straight_through import Range, quantize, whole_range

FORMATS = {
    "asymmetric": integer(bits=3, group_size=16),
    "symmetric": integer(bits=3, group_size=16, symmetric=True),
    "real zero points": integer(bits=3, group_size=16, zero_dtype="float16"),
    "one group per row": integer(bits=2, group_size=None),
    "NF4": formats.nf4(group_size=16),
    "FP8": formats.fp8(),
    "MXFP4": formats.microscaling(group_size=16),
    "NVFP4": formats.nvfp4(),
}


@pytest.fixture(params=FORMATS)
def format(request):
    return FORMATS[request.param]


def weight(seed=0):
    """With a row and a group of zeros, and a group without negative numbers."""
    w = np.random.default_rng(seed).normal(size=(6, 32))
    w[2], w[3, :16], w[4, :16] = 0, 0, np.abs(w[4, :16])
    return jnp.asarray(w, jnp.float32)


def test_the_whole_range_gives_plain_rounding(format):
    w = weight()
    found = quantize(w, whole_range(w, format), format).tensor(format)
    expected = format.quantize(w)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_computed_is_what_is_stored(format, compiled):
    """To the last bit, with ranges that no scale dtype holds, and offsets."""
    w = weight(1)
    low, high = whole_range(w, format)
    rng = np.random.default_rng(2)
    p, q = (jnp.asarray(rng.uniform(0.5, 1, low.shape), jnp.float32) for _ in range(2))
    offset = jnp.asarray(rng.uniform(-0.5, 0.5, w.shape), jnp.float32)
    run = jax.jit(quantize, static_argnames="format") if compiled else quantize
    found = run(w, Range(low * p, high * q), format=format, offset=offset)
    tensor = found.tensor(format)
    tensor.validate()
    # Compiled, the quotient of two scales may be taken after the product: the last bit moves.
    last_bit = 1.2e-7 if compiled and format.nested else 0
    np.testing.assert_allclose(found.dense, tensor.dequantize(), rtol=last_bit, atol=0)
    assert not np.asarray(found.dense)[2].any()
    assert (np.asarray(found.dense) != np.asarray(format.quantize(w).dequantize())).any()


@pytest.mark.some(2)
def test_every_range_is_reached_by_a_finite_gradient(format):
    w = weight(3)
    target = w + 0.1 * jax.random.normal(jax.random.key(0), w.shape)

    def error(parts):
        whole = whole_range(w, format)
        kept = Range(*(end * part for end, part in zip(whole, parts, strict=True)))
        return jnp.sum((quantize(w, kept, format).dense - target) ** 2)

    parts = Range(*(0.9 * jnp.ones_like(end) for end in whole_range(w, format)))
    gradient = jax.grad(error)(parts)
    for part in gradient:
        assert jnp.isfinite(part).all()
    assert (np.abs(gradient.low) + np.abs(gradient.high))[[0, 1, 5]].all()


def test_through_keeps_the_value_and_the_gradient_of_its_first_argument():
    def f(x):
        return straight_through.through(x**2, jnp.round(x**2))

    value, slope = jax.value_and_grad(f)(jnp.float32(1.7))
    assert value == 3 and slope == jnp.float32(3.4)


def test_the_ends_of_the_grid_count_as_inside():
    """Most weights of two bits lie there: a slope of one half, or none, would be another method."""
    format = integer(bits=2, group_size=4, scale_dtype=None)
    w = jnp.array([[-1.0, 0.3, 0.2, 2.0]])

    def total(offset):
        return jnp.sum(quantize(w, whole_range(w, format), format, offset).dense)

    assert (quantize(w, whole_range(w, format), format).codes == jnp.array([[0, 1, 1, 3]])).all()
    np.testing.assert_array_equal(jax.grad(total)(jnp.zeros_like(w)), jnp.ones_like(w))
    np.testing.assert_array_equal(
        jax.grad(total)(jnp.array([[-1.0, 0, 0, 1]])), jnp.array([[0.0, 1, 1, 0]])
    )


@pytest.mark.parametrize(
    "format, sentence",
    [
        (formats.fp8(rows=None), "rows=None"),
        (formats.fp8(rows=8, columns=8), "rows=8"),
        (integer(search="groups"), "search='groups' has no effect on mine"),
    ],
)
def test_what_cannot_be_learned_is_refused(format, sentence):
    with pytest.raises(ValueError, match=sentence):
        straight_through.require_learnable(format, "mine")
