"""Sampled logits: what the paper proves of them, and what is untrue of the largest."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.distillation import divergences, sparse_logit_sampling, top_k_logits
from tests.algorithms.distillation.divergences_official import log_softmax

V = 12


def logits(seed=0, rows=(2, 3), vocabulary=V):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(1.5 * rng.normal(size=(*rows, vocabulary))) for _ in range(2))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.7])
def test_the_estimate_is_unbiased(x64, exponent):
    """Exactly, over all of the V^N draws of a small vocabulary, whatever is drawn from."""
    t = jnp.asarray(np.random.default_rng(1).normal(size=4))
    log_p = jax.nn.log_softmax(t)
    log_g = jax.nn.log_softmax(exponent * log_p)
    draws = jnp.asarray(list(itertools.product(range(4), repeat=3)))
    chance = jnp.exp(log_g[draws].sum(-1))
    spread = (jnp.broadcast_to(x, (len(draws), 4)) for x in (log_p, log_g))
    entries, weights = sparse_logit_sampling.weighed(draws, *spread)
    estimates = (jax.nn.one_hot(entries, 4) * weights[..., None]).sum(1)
    np.testing.assert_allclose(chance @ estimates, jnp.exp(log_p), rtol=1e-12)


def test_on_average_slopes_are_those_of_the_whole_teacher_and_of_the_largest_they_are_not():
    """Within what chance allows, 5 standard errors; the largest are further off."""
    t, s = logits(rows=())
    method = sparse_logit_sampling.sparse_logit_sampling(samples=4, exponent=0.8, weights="float32")

    def slope(key):
        return jax.grad(lambda s: method.per_token(s, method.encode(t, key)))(s)

    slopes = jax.vmap(slope)(jax.random.split(jax.random.key(0), 1000))
    whole = jax.grad(lambda s: divergences.forward_kl()(s, t))(s)
    error = slopes.std(0) / np.sqrt(len(slopes))
    assert (jnp.abs(slopes.mean(0) - whole) < 5 * error).all()
    largest = top_k_logits.top_k_logits(k=4, tail="renormalized", values="float32")
    of_largest = jax.grad(lambda s: largest.per_token(s, largest.encode(t)))(s)
    assert (jnp.abs(of_largest - whole) > 5 * error).any()


def test_a_student_that_is_the_teacher_stays_on_average_and_not_with_the_largest(x64):
    t, _ = logits(rows=())
    largest = top_k_logits.top_k_logits(k=4, tail="renormalized")
    kept = largest.encode(t)
    assert jnp.abs(jax.grad(lambda s: largest.per_token(s, kept))(t)).max() > 0.01
    method = sparse_logit_sampling.sparse_logit_sampling(samples=50, weights="float32")
    slopes = jax.vmap(lambda k: jax.grad(lambda s: method.per_token(s, method.encode(t, k)))(t))(
        jax.random.split(jax.random.key(0), 1000)
    )
    assert (jnp.abs(slopes.mean(0)) < 5 * slopes.std(0) / np.sqrt(1000)).all()


def test_weights_are_counts_and_slots_are_sorted_with_empty_ones_last():
    drawn = jnp.asarray([[3, 1, 3, 3, 7], [2, 2, 2, 2, 2]])
    flat = jnp.zeros((2, 8))
    entries, weights = sparse_logit_sampling.weighed(drawn, flat, flat)
    np.testing.assert_allclose(weights, [[0.2, 0.6, 0.2, 0, 0], [1, 0, 0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(entries, [[1, 3, 7, 0, 0], [2, 0, 0, 0, 0]])


def test_many_draws_come_to_the_teacher():
    t, s = logits()
    method = sparse_logit_sampling.sparse_logit_sampling(samples=600, weights="float32")
    kept = jax.jit(method.encode)(t, jax.random.key(0))
    p = np.exp(log_softmax(np.asarray(t)))
    estimate = sparse_logit_sampling.estimated(kept, V)
    assert (jnp.abs(estimate - p) < 5 * np.sqrt(p * (1 - p) / 600) + 1e-6).all()
    np.testing.assert_allclose(jax.nn.softmax(method.decode(kept, V)), estimate, atol=1e-5)
    loss = method.per_token(s, kept)
    expected = -(estimate * jax.nn.log_softmax(s)).sum(-1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("vocabulary", [V, 70000])
def test_slots_that_no_token_uses_can_be_cut_off(vocabulary):
    t, s = logits(vocabulary=vocabulary)
    t = 3 * t  # few are drawn often
    method = sparse_logit_sampling.sparse_logit_sampling(samples=50)
    kept = method.encode(t, jax.random.key(0))
    used = int((kept.weights > 0).sum(-1).max())
    cut = sparse_logit_sampling.trimmed(kept, used, vocabulary)
    assert cut.weights.shape[-1] == used < 50
    np.testing.assert_allclose(method.per_token(s, cut), method.per_token(s, kept), rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [60, 128256])
@pytest.mark.parametrize("weights", ["float16", "float32"])
def test_its_size_is_what_its_arrays_hold(vocabulary, weights):
    method = sparse_logit_sampling.sparse_logit_sampling(samples=10, weights=weights)
    t, _ = logits(rows=(2,), vocabulary=vocabulary)
    kept = jax.jit(method.encode)(t, jax.random.key(0))
    held = sum(x.nbytes for x in jax.tree.leaves(kept))
    assert method.bytes_per_token(vocabulary) * 2 == held
    assert method.seeded and (kept.weights.sum(-1) > 0.99).all()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(samples=0), "samples=0 must be at least 1"),
        (dict(exponent=0.0), "exponent=0.0 must be positive"),
        (dict(weights="int8"), "weights='int8' must be float16"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        sparse_logit_sampling.sparse_logit_sampling(**settings)
