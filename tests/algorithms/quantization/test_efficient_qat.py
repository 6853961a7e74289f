"""Block-AP against a port of the official code, E2E-QP against finite differences, and rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms import blockwise, formats
from algorithms.blockwise import learn_block
from algorithms.formats import integer
from algorithms.quantization.efficient_qat import e2e_qp, efficient_qat
from tests.algorithms.integers import rtn
from tests.algorithms.learning import PATHS, block, flows, layerwise_error, output_error, through
from tests.algorithms.quantization import efficient_qat_official as official
from tests.algorithms.quantization.learned_layers import (
    dense,
    fit,
    gradients,
    layer,
    quantized,
)


@pytest.mark.parametrize("bits", [2, 3])
def test_takes_the_official_steps(x64, bits):
    """Weights, scales and zero points before each of 15; deviations 1 to 3 are left out."""
    w, x, y = layer(bits)
    w[:, ::8], w[:, 1::8] = -np.abs(w[:, ::8]), np.abs(w[:, 1::8])  # groups of both signs
    rates = dict(learning_rate=2e-2, weight_learning_rate=5e-3)
    expected = official.tune(
        w, x, y, group_size=8, bits=bits, steps=15, quant_lr=2e-2, weight_lr=5e-3
    )
    format = integer(bits=bits, group_size=8, scale_dtype=None)
    method = efficient_qat(format=format, **rates)
    adam = {name: optax.adamw(rate, weight_decay=0.0) for name, rate in
            {"weight": 5e-3, "grid": 2e-2}.items()}  # fmt: skip
    method = method._replace(optimizer=optax.partition(adam, type(method.init(jnp.asarray(w)))(
        "weight", "grid", "grid")))  # fmt: skip
    w, x, y = map(jnp.asarray, (w, x, y))
    p = method.init(w)
    state = method.optimizer.init(p)

    @jax.jit
    def step(p, state):
        g = jax.grad(lambda p: jnp.mean((x @ method.approximate(w, p).T - y) ** 2))(p)
        return blockwise._update(method, g, state, p)

    for theirs in expected:
        np.testing.assert_allclose(p.weight.reshape(-1, 8), theirs.weight, atol=1e-9)
        np.testing.assert_allclose(p.step.reshape(-1, 1), theirs.scale, atol=1e-9)
        np.testing.assert_allclose(p.zero.reshape(-1, 1), theirs.zero_point, atol=1e-9)
        p, state = step(p, state)
    assert np.abs(expected[-1].zero_point - expected[0].zero_point).max() > 0.01


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.some(1)
def test_leaves_less_error_in_the_blocks_output_than_rounding(bits):
    grid = dict(bits=bits, group_size=None)
    inputs = flows()
    method = efficient_qat(format=integer(**grid), steps=100, batch=3, learning_rate=1e-3,
                           weight_learning_rate=1e-3)  # fmt: skip
    tensors, learned = learn_block(
        block(), inputs, through(block(), inputs), dict.fromkeys(PATHS, method), jax.random.key(0)
    )
    assert learned.last < 0.8 * learned.first
    assert output_error(tensors) < 0.8 * layerwise_error(rtn(**grid))


@pytest.mark.parametrize("format", [formats.nf4(group_size=8), formats.microscaling(group_size=8)])
def test_learns_on_grids_without_zero_points(format):
    inputs = flows()
    method = efficient_qat(format=format, steps=40, batch=3, weight_learning_rate=1e-4)
    methods = {"mlp.down": method}
    _, learned = learn_block(block(), inputs, through(block(), inputs), methods, jax.random.key(0))
    assert learned.last < learned.first


def test_begins_as_rounding():
    w = jnp.asarray(layer(4)[0], jnp.float32)
    for format in (integer(bits=3, group_size=8), formats.nvfp4(), formats.nf4(group_size=8)):
        found, expected = efficient_qat(format=format).compress(w), format.quantize(w)
        for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(mine, theirs)


FORMATS = {"int": integer(bits=3, group_size=8), "nf4": formats.nf4(group_size=8),
           "nvfp4": formats.nvfp4(), "block": formats.fp8(rows=4, columns=16)}  # fmt: skip


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.some(2)
def test_steps_of_a_packed_weight_have_the_gradients_of_finite_differences(format):
    """The output is linear in each: what an end-to-end phase learns is smooth."""
    w, x, y = (jnp.float32(a) for a in layer(5))
    made = e2e_qp().make(quantized(w, format), jax.random.key(0))
    step, wide = made.step[...], made.weight.get_value()
    found = gradients(made, x, y)["step"][...]
    for at in [(0, 0), (step.shape[0] - 1, step.shape[1] - 1)]:
        e = 0.25 * step[at]
        ends = [jnp.mean((x @ worth(wide, step.at[at].add(d)).T - y) ** 2) for d in (e, -e)]
        np.testing.assert_allclose(found[at], (ends[0] - ends[1]) / (2 * e), rtol=2e-3)


def worth(tensor, step):
    """The dense weight with steps that nothing rounds."""
    import dataclasses

    return dataclasses.replace(tensor, scale=step, divisor=None).dequantize()


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_the_end_to_end_phase_keeps_codes_and_loses_less(format):
    w, x, y = (jnp.float32(a) for a in layer(6, n=200))
    old = quantized(w, format)
    made = e2e_qp().make(old, jax.random.key(0))
    for mine, theirs in zip(jax.tree.leaves(made.finished()), jax.tree.leaves(old.tensor),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine, theirs)
    first, last = fit(made, x, y)
    assert last < 0.9 * first
    np.testing.assert_array_equal(made.finished().packed, old.tensor.packed)
    assert made.finished().scale.dtype == old.tensor.scale.dtype
    np.testing.assert_allclose(made.finished().matmul(x), made(x), atol=1e-5)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="this is a DenseTensor: begin with a checkpoint"):
        e2e_qp().make(dense(np.float32(layer()[0])), jax.random.key(0))
    for settings, sentence in (
        (dict(format=formats.fp8(rows=None)), "rows=None"),
        (dict(steps=0), "steps=0 must be positive"),
        (dict(weight_learning_rate=-1.0), "weight_learning_rate=-1.0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            efficient_qat(**settings)
