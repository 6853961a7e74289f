"""What a layer or an optimizer may ask of a training step beside gradients and updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from algorithms import training
from algorithms.optimizers.evaluation import start_params
from algorithms.pruning.set import static
from algorithms.training import BackwardBuffer, Batch, Buffer, Sums
from models.predictions import Predictions


@jax.custom_vjp
def noticing(y, largest):
    return y


noticing.defvjp(
    lambda y, largest: (y, largest),
    lambda largest, g: (g, jnp.maximum(largest, jnp.max(jnp.abs(g))).astype(largest.dtype)),
)


class Model(nnx.Module):
    """It remembers its largest gradient, and how often it was passed."""

    def __init__(self):
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        self.largest, self.passes = BackwardBuffer(jnp.zeros(())), Buffer(jnp.zeros((), jnp.int32))

    def predictions(self, x):
        self.passes[...] = self.passes[...] + 1
        return Predictions(noticing(self.linear(x), self.largest[...]))


def weighted(model, teacher, batch, key, *, training):
    """A sum whose gradient by the predictions is what the targets are."""
    hidden = model.predictions(batch.inputs).hidden
    return Sums(jnp.sum(hidden * batch.targets), jnp.float32(len(batch.targets)))


def batch(*sizes):
    targets = np.float32(sizes)[:, None] * np.ones((1, 2), np.float32)
    return Batch(np.ones((len(sizes), 3), np.float32), targets)


def stepped(state, parts, optimizer, sizes, **settings):
    after, _ = training.take_step(
        state, parts.fixed, None, batch(*sizes), graph=parts.graph, objective=weighted,
        optimizer=optimizer, **settings,
    )  # fmt: skip
    return after


@pytest.mark.parametrize("settings", [{}, dict(accumulate=2), dict(dtype="bfloat16")])
def test_the_backward_pass_leaves_its_buffers_behind(settings):
    """Beside those of the forward pass, in the dtype that they had; parts pass one by one."""
    parts, optimizer = training.take_apart(Model()), optax.sgd(0.1)
    state = training.init(parts, optimizer, jax.random.key(0))
    first = stepped(state, parts, optimizer, (1, -5, 2, 3), **settings)
    second = stepped(first, parts, optimizer, (1, 2, -3, 1), **settings)
    third = stepped(second, parts, optimizer, (1, 2, -8, 1), **settings)
    largest = [float(s.buffers["largest"][...]) for s in (state, first, second, third)]
    assert largest == [0, 5, 5, 8]
    assert int(third.buffers["passes"][...]) == 3 * settings.get("accumulate", 1)
    assert jax.tree.structure(third) == jax.tree.structure(state)
    pairs = zip(jax.tree.leaves(third.buffers), jax.tree.leaves(state.buffers), strict=True)
    assert all((a.dtype, a.weak_type) == (b.dtype, b.weak_type) for a, b in pairs)


def test_gradients_are_what_they_are_without_it():
    model, optimizer = Model(), optax.sgd(0.1)
    parts = training.take_apart(model)
    state = training.init(parts, optimizer, jax.random.key(0))
    after = stepped(state, parts, optimizer, (1, -5, 2, 3))
    moved = (state.params["linear"]["kernel"][...] - after.params["linear"]["kernel"][...]) / 0.1
    np.testing.assert_allclose(moved, np.full((3, 2), 0.25), rtol=1e-5)  # their mean


def test_training_begins_where_the_optimizer_does():
    """Wherever the state that wants so is, its first step is from there."""
    sparse = static(optax.sgd(0.1), sparsity=0.5, match=".*kernel")
    parts, optimizer = training.take_apart(Model()), optax.chain(optax.identity(), sparse)
    state = training.init(parts, optimizer, jax.random.key(0))
    kernel = state.params["linear"]["kernel"][...]
    assert int((kernel == 0).sum()) == 3
    assert int((parts.params["linear"]["kernel"][...] == 0).sum()) == 0
    plain = optax.adam(0.1)
    assert start_params(plain.init(parts.params), parts.params) is parts.params
