"""The learned clip against a port of the authors' code, finite differences, and no learning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.formats import integer
from algorithms.quantization.pact import ClippedInputs, pact
from algorithms.tensors import DenseTensor, QuantizedTensor
from tests.algorithms.quantization import pact_official as official
from tests.algorithms.quantization.learned_layers import dense, fit, layer, quantized, updated


def positive(seed):
    w, x, _ = layer(seed)
    x = np.abs(x)
    return np.float32(w), np.float32(x), np.float32(x @ w.T)


@pytest.mark.parametrize("bits", [2, 4])
def test_takes_the_official_steps(bits):
    """α and W at each of 12 steps of gradient descent, in float32."""
    w, x, y = positive(bits)
    made = pact(bits=bits, alpha=2.0, symmetric=False).make(dense(w), jax.random.key(0))
    alpha, weight, rate = 2.0, np.float64(w), 0.02
    for _ in range(12):
        seen = official.forward(np.float64(x), alpha, bits)
        error = 2 / y.size * (seen @ weight.T - y)
        by_alpha = official.backward(np.float64(x), alpha, error @ weight)[1]
        alpha, weight = alpha - rate * by_alpha, weight - rate * error.T @ seen
        updated(made, jnp.asarray(x), jnp.asarray(y), rate)
        np.testing.assert_allclose(made.inputs.alpha[...], alpha, rtol=1e-5)
        np.testing.assert_allclose(made.kernel[...].T, weight, atol=1e-5)
    assert abs(alpha - 2) > 0.01


def test_an_input_beyond_the_clip_has_no_gradient():
    inputs = ClippedInputs(4, 2.0, symmetric=True)
    x = jnp.asarray([[-2.3, -2.2, -1.0, 0.0, 1.9, 2.1]])
    found = jax.grad(lambda x: inputs.rounded(x).sum())(x)
    np.testing.assert_array_equal(found, [[0, 1, 1, 1, 1, 0]])  # -8/7 of 2 is -2.29


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_gradient_of_the_clip_is_that_of_its_ends(symmetric):
    """Beyond, where nothing is rounded, it is that of finite differences; within, none."""
    x = jnp.asarray([[5.0, 6.0, -5.0 if symmetric else -0.0, 7.0]])
    weights = jnp.asarray([[1.0, 2.0, 4.0, -0.5]])

    def total(alpha, x=x):
        made = ClippedInputs(4, 1.0, symmetric=symmetric)
        made.alpha.set_value(alpha)
        return (weights * made.rounded(x)).sum()

    slope = (total(jnp.float32(2.25)) - total(jnp.float32(1.75))) / 0.5
    np.testing.assert_allclose(jax.grad(total)(jnp.float32(2.0)), slope, rtol=1e-5)
    assert jax.grad(total)(jnp.float32(2.0), 0.1 * x) == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_stored_rounds_and_clips_as_the_layer_does(symmetric):
    w, x, _ = layer(5)
    made = pact(bits=4, alpha=1.0, symmetric=symmetric).make(
        dense(np.float32(w)), jax.random.key(0)
    )
    x = jnp.float32(x)
    np.testing.assert_array_equal(made.finished().rounded(x), made.inputs.rounded(x))
    assert isinstance(made.finished().weight, DenseTensor)
    np.testing.assert_allclose(made.finished().matmul(x), made(x), atol=1e-6)
    least = 0 if not symmetric else -8 / 7
    assert float(made.inputs.rounded(x).min()) == pytest.approx(least, rel=1e-6)
    assert float(made.inputs.rounded(x).max()) == pytest.approx(1)


def test_learning_the_clip_is_better_than_keeping_it():
    w, x, y = (jnp.float32(a) for a in layer(6, n=200))
    losses = []
    for only in (nnx.Param, lambda path, _: "kernel" in path):
        made = pact(bits=3, alpha=1.0).make(dense(w), jax.random.key(0))
        losses.append(fit(made, x, y, 0.03, 200, only)[1])
    assert losses[0] < 0.9 * losses[1]


def test_weights_are_rounded_too_where_a_format_says_so():
    w, x, _ = layer(7)
    format = integer(bits=4, group_size=16)
    for old in (dense(np.float32(w)), quantized(w, format)):
        made = pact(format=format).make(old, jax.random.key(0))
        assert isinstance(made.finished().weight, QuantizedTensor)


@pytest.mark.parametrize(("settings", "sentence"), [
    (dict(alpha=0.0), "alpha=0.0 must be positive"), (dict(bits=1), "bits=1 must be from 2 to 8"),
])  # fmt: skip
def test_refuses_what_it_cannot_do(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        pact(**settings)
