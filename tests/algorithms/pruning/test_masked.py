"""Training with a mask that stays: what is learned, what is stored, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from algorithms import formats, parametrization, surgery
from algorithms.pruning.magnitude import magnitude
from algorithms.pruning.masked import masked
from algorithms.pruning.pruned import pruned
from algorithms.quantization.rtn import rtn

FORMAT = formats.integer(bits=4, group_size=8)
TENSORS = {
    "numbers": magnitude(dtype="float32"),
    "half": magnitude(sparsity=0.3, within="row"),
    "2:4": magnitude(keep=2, block=4),
    "codes": pruned(magnitude(), rtn(format=FORMAT)),
    "2:4 codes": pruned(magnitude(keep=2, block=4), rtn(format=FORMAT)),
}
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(6, 16)), jnp.float32)
MIXED = RNG.normal(size=(64, 16)) @ (np.eye(16) + 0.5 * RNG.normal(size=(16, 16)))
X = jnp.asarray(MIXED / MIXED.std(), jnp.float32)


class Model(nnx.Module):
    def __init__(self, tensor):
        self.blocks = nnx.List([nnx.Linear(16, 6, rngs=nnx.Rngs(0))])
        surgery.compress_linear(self, "blocks.0", tensor)

    def __call__(self, x):
        return self.blocks[0](x)


def loss(model):
    return jnp.mean((model(X) - X @ W.T) ** 2)


def learned(model, steps=60):
    """By gradient descent towards what the dense weight gives."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model)))
    for _ in range(steps):
        step(model, optimizer)
    return model


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.some(3)
def test_the_form_stays_and_the_rest_is_learned(name):
    tensor = TENSORS[name].compress(W, None)
    model = Model(tensor)
    masked().apply(model, jax.random.key(0))
    before = loss(model)
    np.testing.assert_allclose(model(X), X @ tensor.dequantize().T, atol=1e-5)
    learning = learned(model)(X)
    assert loss(model) < 0.8 * before  # than one shot
    parametrization.finish(model)
    found = model.blocks[0].tensor
    assert jax.tree.structure(found) == jax.tree.structure(tensor)
    assert found.storage_bits() == tensor.storage_bits()
    np.testing.assert_array_equal(found.alive(), tensor.alive())
    np.testing.assert_allclose(model(X), learning, atol=1e-5)
    assert bool((found.dequantize() != tensor.dequantize()).any())


def test_what_is_gone_has_no_slope_and_the_best_of_the_rest_none(x64):
    """Least squares on each row's own inputs is where the gradient ends."""
    w, x = (np.asarray(a, np.float64) for a in (W, X))
    tensor = magnitude(keep=2, block=4, dtype="float64").compress(jnp.asarray(w), None)
    model, alive = Model(tensor), np.asarray(tensor.alive())
    masked().apply(model, jax.random.key(0))
    best = np.zeros_like(w)
    for row, own in enumerate(alive):
        best[row, own] = np.linalg.lstsq(x[:, own], x @ w[row], rcond=None)[0]

    def slope(kernel):
        model.blocks[0].kernel.set_value(jnp.asarray(kernel))
        return np.asarray(nnx.grad(loss)(model).blocks[0].kernel[...]).T

    before = slope(np.asarray(tensor.dequantize()).T)
    assert not before[~alive].any() and (np.abs(before[alive]) > 1e-4).all()
    np.testing.assert_allclose(slope(best.T), 0, atol=1e-5)  # of a loss in float32


def test_a_dense_layer_keeps_its_zeros():
    model = Model(TENSORS["numbers"].compress(W, None))
    surgery.replace(model, "blocks.0", surgery.linear(model.blocks[0].tensor.dequantize()))
    zeros = np.asarray(model.blocks[0].kernel[...]) == 0
    before = loss(model)
    masked().apply(model, jax.random.key(0))
    learned(model)
    parametrization.finish(model)
    assert loss(model) < 0.8 * before
    np.testing.assert_array_equal(np.asarray(model.blocks[0].kernel[...]) == 0, zeros)


def test_layers_without_zeros_are_refused():
    model = Model(FORMAT.quantize(W))
    with pytest.raises(ValueError, match="A QuantizedTensor has no zeros .* begin with a model"):
        masked().apply(model, jax.random.key(0))
    surgery.replace(model, "blocks.0", surgery.linear(W))
    with pytest.raises(ValueError, match="masked keeps zeros, and a layer has none"):
        masked().apply(model, jax.random.key(0))
