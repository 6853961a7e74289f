"""SR-STE against a port of the official code, the pattern it leaves, and one chosen once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from algorithms import parametrization
from algorithms.optimizers.groups import grouped
from algorithms.pruning.n_m import sr_ste
from tests.algorithms.pruning import sr_ste_official as official


class Model(nnx.Module):
    def __init__(self, i=16, o=6):
        self.blocks = nnx.List([nnx.Linear(i, o, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return self.blocks[0](x)


def made(model, **settings):
    method = sr_ste(**settings)
    assert method.apply(model, jax.random.key(0)) == ["blocks.0"]
    return method


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(32, 16)), rng.normal(size=(32, 6))


@pytest.mark.parametrize("keep, block", [(2, 4), (1, 4), (4, 8)])
def test_is_the_official_code(data, keep, block):
    """Twelve steps of gradient descent, with a decay that shows."""
    with jax.enable_x64(True):
        model = Model()
        method = made(model, keep=keep, block=block, decay=0.3)
        kernel = model.blocks[0].kernel
        kernel.set_value(jnp.asarray(np.random.default_rng(1).normal(size=(16, 6))))
        model.blocks[0].bias.set_value(jnp.zeros(6))
        x, y = map(jnp.asarray, data)
        graph, params = nnx.split(model)
        optimizer = method.around(optax.sgd(0.5))
        state = optimizer.init(params)
        w, b = np.asarray(kernel[...]).T, np.zeros(6)

        def loss(params):
            return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        changed = set()
        for _ in range(12):
            params, state = step(params, state)
            error = 2 * (x @ official.forward(w, keep, block).T + b - y) / y.size
            b = b - 0.5 * error.sum(0)
            w = w - 0.5 * official.backward(w, error.T @ x, keep, block, 0.3)
            np.testing.assert_allclose(params["blocks"][0]["kernel"][...].T, w, rtol=1e-10)
            changed.add(official.mask(w, keep, block).tobytes())
        assert len(changed) > 1  # weights changed places


def test_what_is_finished_is_what_was_computed_with(data):
    model = Model()
    made(model)
    x = jnp.asarray(data[0], jnp.float32)
    before = model(x)
    assert parametrization.finish(model) == ["blocks.0"]
    assert type(model.blocks[0]) is nnx.Linear
    np.testing.assert_array_equal(model(x), before)
    blocks = np.asarray(model.blocks[0].kernel[...]).T.reshape(6, 4, 4)
    np.testing.assert_array_equal((blocks != 0).sum(-1), 2)


def test_the_decay_reaches_its_own_layers_alone():
    """Beside groups too, where others' leaves are masked."""
    model = Model()
    method = made(model, decay=1.0)
    params = nnx.state(model, nnx.Param)
    inner = grouped(match={"k": r".*kernel", "rest": ".*"}, k=optax.sgd(1.0), rest=optax.sgd(1.0))
    optimizer = method.around(inner)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    layer = after["blocks"][0]
    np.testing.assert_array_equal(layer["kernel"][...].T, model.blocks[0].finished())
    np.testing.assert_array_equal(layer["bias"][...], params["blocks"][0]["bias"][...])


def test_learns_a_better_pattern_than_that_of_the_first_weights(data):
    """Against the same pattern from beginning to end."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(256, 16)), jnp.float32)
    true = rng.normal(size=(6, 16)) * official.mask(rng.normal(size=(6, 16)), 2, 4)
    y = x @ jnp.asarray(true.T, jnp.float32)

    def trained(fixed):
        model = Model()
        method = made(model)
        start = model.blocks[0].finished() != 0
        graph, params = nnx.split(model)
        optimizer = method.around(optax.adam(0.02))
        state = optimizer.init(params)

        def loss(params):
            model = nnx.merge(graph, params)
            if fixed:
                kernel = model.blocks[0].kernel
                kernel.set_value(jnp.where(start.T, kernel[...], 0))
            return jnp.mean((model(x) - y) ** 2)

        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(200):
            params, state = step(params, state)
        return float(loss(params))

    assert trained(fixed=False) < 0.3 * trained(fixed=True)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(keep=4), "keep=4 must be from 1 to block=4 - 1"),
        (dict(decay=-1.0), "decay=-1.0 must not be negative"),
        (dict(keep=2, block=5), "block=5 must divide the 16 inputs of a layer"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(Model(), **settings)


def test_layers_that_are_not_dense_are_refused():
    model = Model()
    made(model)
    with pytest.raises(ValueError, match="matches no linear layer"):  # none is left to learn
        made(model)
