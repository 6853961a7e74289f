"""Sampling in one graph against the model without a cache, and what chance allows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.decoding.sampling import filtered, generate
from models.config import DecoderConfig
from models.decoder import Decoder
from models.layers import empty_cache

SMALL = DecoderConfig(
    vocabulary=13, hidden=16, layers=2, heads=2, kv_heads=1, head_size=8, feed_forward=20,
    context=24,
)  # fmt: skip
PROMPT = jnp.asarray([[3, 1, 4, 1], [5, 9, 0, 0], [2, 0, 0, 0]], jnp.int32)
COUNT = jnp.asarray([4, 2, 1], jnp.int32)


@pytest.fixture(scope="module")
def model():
    return Decoder(SMALL, rngs=nnx.Rngs(0))


def written(model, steps, key=0, **settings):
    caches = tuple(empty_cache(SMALL, n, len(PROMPT), 4 + steps) for n in range(SMALL.layers))
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, caches, key):
        decode = nnx.merge(graph, state).decode
        return generate(decode, caches, PROMPT, COUNT, key, steps=steps, **settings)

    return run(state, caches, jax.random.key(key))


def test_the_likeliest_are_those_of_the_model_without_a_cache(model):
    found = written(model, 5, temperature=0.0)
    room = PROMPT.shape[1] + 5  # one shape for all: what comes later does not count
    for row, count in enumerate(map(int, COUNT)):
        text = jnp.zeros(room, int).at[:count].set(PROMPT[row, :count])
        text = text.at[count : count + 5].set(found.tokens[row])
        likeliest = jnp.argmax(model(text[None])[0], -1)
        np.testing.assert_array_equal(found.tokens[row], likeliest[count - 1 : count + 4])
    assert found.mask.all() and not found.log_probabilities.any()


def test_log_probabilities_are_those_of_the_model(model):
    found = written(model, 4, key=1)
    for row in range(3):
        count = int(COUNT[row])
        text = jnp.concatenate([PROMPT[row, :count], found.tokens[row]])
        log_q = jax.nn.log_softmax(model(text[None])[0])
        expected = jnp.take_along_axis(log_q[count - 1 : -1], text[count:, None], 1)[:, 0]
        np.testing.assert_allclose(found.log_probabilities[row], expected, rtol=1e-4)


def test_the_key_says_all_and_rows_and_steps_draw_by_keys_of_their_own(model):
    first, again, other = (written(model, 8, key=k) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.tokens != other.tokens).any()

    def flat(tokens, cache, count):
        return jnp.zeros((64, 500)), cache

    alike = generate(flat, (), jnp.zeros((64, 1), jnp.int32), jnp.ones(64, jnp.int32),
                     jax.random.key(0), steps=6)  # fmt: skip
    assert len(np.unique(alike.tokens)) > 200  # of 384 draws from 500


def test_behind_a_stop_token_the_mask_is_0(model):
    free = written(model, 12, key=2)
    stop = int(free.tokens[0, 3])
    found = written(model, 12, key=2, stop=stop)
    for tokens, mask, log_p, before in zip(*found, free.tokens, strict=True):
        hits = np.flatnonzero(np.asarray(before) == stop)
        length = hits[0] + 1 if len(hits) else 12
        np.testing.assert_array_equal(mask, np.arange(12) < length)
        np.testing.assert_array_equal(tokens[:length], before[:length])
        assert (tokens[length:] == stop).all() and not log_p[length:].any()
    assert found.mask[0].sum() <= 4


@pytest.mark.parametrize("settings", [
    dict(temperature=1.0), dict(temperature=0.5), dict(temperature=2.0, top_k=3),
    dict(temperature=1.0, top_p=0.7), dict(temperature=1.0, top_k=5, top_p=0.6),
])  # fmt: skip
def test_tokens_are_drawn_as_often_as_they_are_likely(settings):
    """Within 5 standard errors of what the settings leave of the distribution."""
    rows, logits = 4000, jnp.asarray([2.0, 1.5, 1.0, 0.3, -1.0, -4.0])
    expected = np.exp(np.asarray(logits) / settings["temperature"])
    expected[settings.get("top_k", 6) :] = 0
    expected /= expected.sum()
    before = np.cumsum(expected) - expected
    expected = np.where(before < settings.get("top_p", 1.1), expected, 0)
    expected /= expected.sum()

    def decode(tokens, cache, count):
        return jnp.broadcast_to(logits, (rows, 6)), cache

    prompt, count = jnp.zeros((rows, 1), jnp.int32), jnp.ones(rows, jnp.int32)
    run = functools.partial(generate, decode, (), prompt, count, steps=3, **settings)
    found = jax.jit(run)(jax.random.key(0))
    often = np.bincount(np.asarray(found.tokens).ravel(), minlength=6) / (3 * rows)
    error = np.sqrt(expected * (1 - expected) / (3 * rows))
    assert (np.abs(often - expected) <= 5 * error).all()
    log_p = np.log(np.where(expected > 0, expected, 1))[np.asarray(found.tokens)]
    np.testing.assert_allclose(found.log_probabilities, log_p, rtol=1e-4, atol=1e-6)


def test_the_first_of_equals_is_taken_at_temperature_0():
    found = filtered(jnp.asarray([[1.0, 3.0, 3.0]]), 0.0)
    np.testing.assert_array_equal(jax.nn.softmax(found), [[0, 1, 0]])


def test_the_graph_does_not_grow_with_the_steps(model):
    graph, state = nnx.split(model)

    def size(steps):
        caches = tuple(empty_cache(SMALL, n, 3, 24) for n in range(2))
        decode = nnx.merge(graph, state).decode
        run = functools.partial(generate, decode, steps=steps)
        return len(str(jax.make_jaxpr(run)(caches, PROMPT, COUNT, jax.random.key(0))))

    assert abs(size(16) / size(4) - 1) < 0.01


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(temperature=-1.0), "temperature=-1.0 must not be negative"),
        (dict(top_k=0), "top_k=0 must be at least 1"),
        (dict(top_p=0.0), r"top_p=0.0 must be in \(0, 1\]"),
    ],
)
def test_bad_settings_are_named(model, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        written(model, 2, **settings)
