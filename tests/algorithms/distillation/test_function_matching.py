"""Function matching against a port of the official code, its theory, and unmixed inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.distillation.function_matching import function_matching, mixing_share, mixup
from tests.algorithms.distillation import function_matching_official as official


def images(n=6):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, 4, 4, 3)))


@pytest.mark.parametrize("drawn", [0.1, 0.5, 0.83])
def test_equals_the_official_code(x64, drawn):
    x = images()
    theirs = official.mixup(np.asarray(x), drawn)
    ours = mixup({"image": x}, jnp.asarray([max(drawn, 1 - drawn)]))["image"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    s, t = x[:, 0].reshape(6, -1), x[:, 1].reshape(6, -1)
    loss = function_matching(temperature=2.0).loss
    theirs = official.kl(np.asarray(s), np.asarray(t), 2.0)
    np.testing.assert_allclose(loss.per_token(s, t), theirs, rtol=1e-12)


def test_shares_are_drawn_as_the_official_code_draws_them():
    key = jax.random.key(3)
    a = jax.random.beta(key, 1.0, 1.0, (1,))
    np.testing.assert_array_equal(mixing_share(key, 1, 1.0), jnp.maximum(a, 1 - a))
    shares = mixing_share(jax.random.key(0), 4000, 1.0)
    assert shares.min() >= 0.5 and shares.max() <= 1
    assert float(shares.mean()) == pytest.approx(0.75, abs=0.01)  # uniform from ½ to 1
    assert mixing_share(jax.random.key(0), 4000, 0.01).mean() > 0.98


@pytest.mark.parametrize("per_example", [False, True])
def test_the_key_says_all_and_both_models_can_see_the_same(per_example):
    augment = jax.jit(function_matching(per_example=per_example).augment)
    x = images()
    first, again, other = (augment(jax.random.key(k), x) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 0.01
    shares = (first - jnp.roll(x, 1, 0)) / (x - jnp.roll(x, 1, 0))
    assert (jnp.ptp(shares.mean((1, 2, 3))) > 1e-3) == per_example


def test_mixing_keeps_the_batchs_mean_and_draws_examples_nearer(x64):
    x = images()
    mixed = function_matching().augment(jax.random.key(0), x)
    np.testing.assert_allclose(mixed.mean(0), x.mean(0), rtol=1e-12)
    assert mixed.var(0).mean() < x.var(0).mean()


def test_inputs_beyond_the_data_teach_the_function():
    """A student of few examples and many steps: its KL on others, with and without mixing."""
    rng = np.random.default_rng(1)

    def network(seed, width):
        rng = np.random.default_rng(seed)
        return [jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)
                for shape in ((6, width), (width, 4))]  # fmt: skip

    def apply(weights, x):
        return jnp.tanh(2 * x @ weights[0]) @ weights[1] * 2

    teacher, x = network(0, 8), jnp.asarray(rng.normal(size=(516, 6)), jnp.float32)
    few, others, method = x[:16], x[16:], function_matching()

    @functools.partial(jax.jit, static_argnums=0)
    def trained(mixes):
        def step(n, weights):
            key = jax.random.fold_in(jax.random.key(0), n)
            seen = method.augment(key, few) if mixes else few
            slope = jax.grad(lambda w: method.loss(apply(w, seen), apply(teacher, seen)))(weights)
            return [w - 0.3 * g for w, g in zip(weights, slope, strict=True)]

        weights = jax.lax.fori_loop(0, 1500, step, network(5, 16))
        return method.loss(apply(weights, others), apply(teacher, others))

    assert trained(True) < 0.9 * trained(False)


def test_tokens_cannot_be_mixed():
    with pytest.raises(ValueError, match="Inputs of dtype int32 cannot be mixed"):
        function_matching().augment(jax.random.key(0), jnp.zeros((2, 3), jnp.int32))


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="concentration=0.0 must be positive"):
        function_matching(concentration=0.0)
