"""One step of training: gradients, micro-batches, masks, frozen weights, what is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from algorithms import training
from algorithms.objectives import CrossEntropy
from algorithms.optimizers.groups import named
from algorithms.training import Batch, Buffer, Sums
from models.config import DecoderConfig
from models.decoder import Decoder
from models.mlp import MLPClassifier

CONFIG = DecoderConfig(
    vocabulary=24, hidden=16, layers=2, heads=2, kv_heads=1, head_size=8, feed_forward=20,
    context=16,
)  # fmt: skip


def model(**changes):
    return Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def batch(size=4, masked=False):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 24, (size, 9)).astype(np.int32)
    mask = (rng.random((size, 8)) < 0.6).astype(np.float32) if masked else None
    return Batch(tokens[:, :-1], tokens[:, 1:], mask)


def stepped(parts, examples, optimizer=None, **options):
    optimizer = optimizer or optax.sgd(1.0)
    state = training.init(parts, optimizer, jax.random.key(0))
    state = jax.tree.map(jnp.copy, state)
    return training.step(
        state, parts.fixed, None, examples, graph=parts.graph,
        objective=options.pop("objective", CrossEntropy()), optimizer=optimizer, **options,
    )  # fmt: skip


def gradient(parts, examples, **options):
    """What a step of SGD with a learning rate of one subtracts."""
    after, _ = stepped(parts, examples, **options)
    return jax.tree.map(lambda a, b: a - b, parts.params, after.params)


def close(found, expected, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def plainly(parts, examples):
    """The gradient by JAX of the mean cross-entropy over logits that are all there."""

    def loss(params):
        logits = nnx.merge(parts.graph, params, parts.buffers, parts.fixed)(
            jnp.asarray(examples.inputs)
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples.targets)
        weights = jnp.ones_like(losses) if examples.mask is None else examples.mask
        return jnp.sum(losses * weights) / jnp.sum(weights)

    return jax.grad(loss)(parts.params)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.some(2)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(masked, accumulate):
    parts, examples = training.take_apart(model()), batch(masked=masked)
    close(gradient(parts, examples, accumulate=accumulate), plainly(parts, examples))


def test_a_tied_embedding_gets_both_its_gradients():
    parts, examples = training.take_apart(model(tied_embeddings=True)), batch()
    close(gradient(parts, examples), plainly(parts, examples))


def test_activations_computed_anew_change_no_gradient():
    parts, examples = training.take_apart(model()), batch()
    anew = model()
    anew.remat = True
    close(gradient(training.take_apart(anew), examples), gradient(parts, examples), 1e-7)


def test_parts_that_do_not_divide_are_refused():
    parts = training.take_apart(model())
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch of 4"):
        stepped(parts, batch(), accumulate=3)


def test_only_what_matches_is_learned():
    parts = training.take_apart(model(), r".*\.attention\.q\.kernel")
    assert list(named(parts.params)) == [f"blocks.{n}.attention.q.kernel" for n in range(2)]
    close(gradient(parts, batch()), jax.tree.leaves(plainly(parts, batch())))


@pytest.mark.parametrize(
    "pattern, sentence",
    [("nothing", "trainable='nothing' matches no parameter"), ("(", "is no regular expression")],
)
def test_patterns_that_do_not_serve_are_refused(pattern, sentence):
    with pytest.raises(ValueError, match=sentence):
        training.take_apart(model(), pattern)


def test_the_first_leaf_that_is_not_finite_is_named():
    parts = training.take_apart(model())
    names = training.leaf_names(parts.params)
    assert int(stepped(parts, batch())[1].bad) == -1

    def broken(model, teacher, examples, key, *, training):
        hidden = model.predictions(examples.inputs).hidden
        nothing = jnp.sqrt(jnp.zeros(()) * hidden[0, 0])  # whose slope is infinite
        return Sums(nothing, jnp.ones(()), {})

    _, metrics = stepped(parts, batch(), objective=broken)
    assert names[int(metrics.bad)].startswith("blocks.0.")


def test_a_second_step_compiles_nothing():
    parts, examples, optimizer = training.take_apart(model()), batch(), optax.adam(1e-3)
    options = dict(graph=parts.graph, objective=CrossEntropy(), optimizer=optimizer)
    state = jax.tree.map(jnp.copy, training.init(parts, optimizer, jax.random.key(0)))
    state, _ = training.step(state, parts.fixed, None, examples, **options)
    before = training.step._cache_size()
    state, _ = training.step(state, parts.fixed, None, examples, **options)
    assert training.step._cache_size() == before
    assert int(state.step) == 2


def test_bfloat16_is_computed_in_and_not_learned_in():
    parts, examples = training.take_apart(model()), batch()
    found = gradient(parts, examples, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    expected = jax.tree.leaves(plainly(parts, examples))
    for a, b in zip(jax.tree.leaves(found), expected, strict=True):
        difference, size = np.linalg.norm(np.asarray(a - b)), np.linalg.norm(np.asarray(b))
        assert 0 < difference < 0.05 * size


class Counting(nnx.Module):
    """A classifier that counts its forward passes."""

    def __init__(self):
        self.inner = MLPClassifier(3, [4], 2, rngs=nnx.Rngs(0))
        self.passes = Buffer(jnp.zeros((), jnp.int32))

    def predictions(self, x):
        self.passes.set_value(self.passes[...] + 1)
        return self.inner.predictions(x)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_buffers_are_what_forward_passes_leave(accumulate):
    parts = training.take_apart(Counting())
    examples = Batch(np.ones((4, 3), np.float32), np.array([0, 1, 0, 1]))
    state, metrics = stepped(parts, examples, accumulate=accumulate)
    assert [int(x) for x in jax.tree.leaves(state.buffers)] == [accumulate]
    assert 0 <= float(metrics.means["accuracy"]) <= 1


def test_a_penalty_on_the_normalizer_pulls_it_to_one():
    parts, examples = training.take_apart(model()), batch()
    found = gradient(parts, examples, objective=CrossEntropy(z_loss=0.1))

    def loss(params):
        logits = nnx.merge(parts.graph, params, parts.buffers, parts.fixed)(
            jnp.asarray(examples.inputs)
        )
        return 0.1 * jnp.mean(jax.nn.logsumexp(logits, -1) ** 2)

    extra = jax.tree.map(lambda a, b: a - b, found, plainly(parts, examples))
    close(extra, jax.grad(loss)(parts.params), 5e-6)
    with pytest.raises(ValueError, match="z_loss=-1 must not be negative"):
        CrossEntropy(z_loss=-1)
