"""PSGD-Kron against a port of its JAX version, and what its preconditioner is fitted to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.kron import BALANCED, annealed_probability, kron, scale_by_kron
from algorithms.optimizers.whitening import norm_bound
from tests.algorithms.optimizers import kron_official as official
from tests.algorithms.optimizers.matrices import distances, gradients, orthogonal, program, updates

STEPS = 24
ALWAYS = dict(update_probability=1.0)


def draws(seed, shape, steps=STEPS):
    """(V, whether Q is balanced) of each step."""
    for count in range(steps):
        key = jax.random.fold_in(jax.random.key(seed), count)
        balance, noise = jax.random.split(key)
        like = jnp.zeros((1, *shape) if len(shape) == 1 else shape)
        v = optax.tree.random_like(noise, like).reshape(shape)
        yield np.asarray(v), bool(jax.random.uniform(balance) < BALANCED)


def balancing(steps=STEPS // 2):
    """A seed that balances in one of the first steps."""

    def balances(seed, count):
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.uniform(jax.random.split(key)[0]) < BALANCED

    table = jax.vmap(jax.vmap(balances, (None, 0)), (0, None))(jnp.arange(64), jnp.arange(2, steps))
    return int(np.flatnonzero(table.any(axis=1))[0])


@pytest.mark.parametrize(
    "shape, ours, theirs",
    [
        ((6, 5), {}, {}),
        ((5, 8), dict(max_size_triangular=7, b1=0.5), dict(max_size_triangular=7, b1=0.5)),
        ((8, 5), dict(max_size_triangular=7, factor_learning_rate=0.3),
         dict(max_size_triangular=7, preconditioner_lr=0.3)),
        ((5, 6), dict(min_ndim_triangular=3, initial_scale=4.0),
         dict(min_ndim_triangular=3, preconditioner_init_scale=4.0)),
        ((1, 6), dict(fit_to_momentum=False), dict(momentum_into_precond_update=False)),
        ((7,), dict(initial_scale=0.5), dict(preconditioner_init_scale=0.5)),
        ((7,), dict(min_ndim_triangular=1), dict(min_ndim_triangular=1)),
    ],
)  # fmt: skip
@pytest.mark.some(3)
def test_its_steps_are_those_of_the_jax_version(x64, shape, ours, theirs):
    grads, seed = 0.1 * gradients(shape, STEPS), balancing()

    def probability(count):  # 1 for 12 steps, then falling to 0.45
        return np.clip(np.exp(-0.2 * (count - 12)), 0.45, 1.0)

    port = official.Kron(shape, probability=probability, **theirs)
    expected, fits, balanced = [], 0, 0
    for g, (v, balances) in zip(grads, draws(seed, shape), strict=True):
        expected.append(port.step(g, v, balances))
        fits, balanced = fits + port.due, balanced + (port.due and balances)
    schedule = annealed_probability(minimum=0.45, decay=0.2, flat=12)
    found, _ = updates(kron(1.0, update_probability=schedule, seed=seed, **ours), grads)
    np.testing.assert_allclose(-found, expected, rtol=1e-9, atol=1e-12)
    assert STEPS / 2 < fits < STEPS and balanced


def test_a_stack_is_its_matrices(x64):
    """Given the same V: with as many zeros in the place of the others, Q stays."""
    grads = gradients((3, 5, 6), STEPS)
    found, _ = updates(scale_by_kron(**ALWAYS), grads)
    for each in range(3):
        alone = np.where(np.arange(3)[:, None, None] == each, grads, 0.0)
        only, state = updates(scale_by_kron(**ALWAYS), alone)
        np.testing.assert_allclose(only[:, each], found[:, each], rtol=1e-9)
        others = np.delete(np.asarray(state.factors.left), each, axis=0)
        np.testing.assert_array_equal(others, np.broadcast_to(np.eye(5), others.shape))


def test_it_whitens_gradients(x64):
    """E[P g gᵀ P] comes from a condition of 10⁴ to near I."""
    rng = np.random.default_rng(0)
    left, right = (orthogonal(d, rng) * np.logspace(0, -1, d) for d in (5, 4))
    grads = left @ rng.normal(size=(6000, 5, 4)) @ right.T
    settings = dict(update_probability=1.0, b1=0.0, factor_learning_rate=0.02)
    found, _ = updates(scale_by_kron(**settings), grads)

    def spread(stream):
        values = np.linalg.eigvalsh(np.cov(stream.reshape(len(stream), -1).T))
        return values.max() / values.min()

    assert spread(grads) > 5e3
    assert spread(found[-3000:]) < 4
    assert 0.7 < np.mean(found[-3000:] ** 2) < 1.1  # clipped at a root mean square of 1.1


def test_its_updates_do_not_depend_on_the_gradients_scale(x64):
    """Exactly, for Q smaller by the root; in the end, for any Q."""
    grads = gradients((5, 6), 400)
    found, _ = updates(scale_by_kron(**ALWAYS), grads)
    larger, _ = updates(scale_by_kron(initial_scale=0.1, **ALWAYS), 100 * grads)
    np.testing.assert_allclose(larger, found, rtol=1e-6, atol=1e-9)
    alike, _ = updates(scale_by_kron(**ALWAYS), 100 * grads)
    ratio = np.sqrt(np.mean(alike[-100:] ** 2) / np.mean(found[-100:] ** 2))
    assert 0.9 < ratio < 1.1


def test_its_factors_stay_in_their_group(x64):
    """Triangular, with a positive diagonal; a diagonal stays positive."""
    _, state = updates(scale_by_kron(max_size_triangular=5, **ALWAYS), gradients((5, 6), 200))
    left, right = (np.asarray(q) for q in state.factors)
    np.testing.assert_array_equal(np.tril(left, -1), 0)
    assert (np.diag(left) > 0).all() and (right > 0).all()
    assert np.abs(np.triu(left, 1)).max() > 1e-2


def test_a_lower_bound_of_the_norm_is_one(x64):
    for seed in range(20):
        x = np.random.default_rng(seed).normal(size=(6, 3))
        found, norm = float(norm_bound(jnp.asarray(x @ x.T))), np.linalg.norm(x @ x.T, 2)
        assert norm / 2**0.5 <= found <= norm * (1 + 1e-12)
    assert float(norm_bound(jnp.zeros((3, 3)))) == 0


def test_a_dead_matrix_stays_whitened_by_what_it_had():
    """Q would grow by a tenth in each step, to inf in a thousand."""
    grads = np.concatenate([gradients((4, 6), 50), np.zeros((2500, 4, 6))])
    found, state = updates(scale_by_kron(**ALWAYS), grads.astype(np.float32))
    assert np.isfinite(found).all() and not found[-1].any()
    assert all(np.isfinite(q).all() for q in state.factors)


def test_seeds_are_what_it_depends_on():
    grads = gradients((4, 6), 5).astype(np.float32)
    first, again, other = (updates(scale_by_kron(seed=s), grads)[0] for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_the_probability_falls_as_it_says():
    found = annealed_probability()(jnp.asarray([1, 500, 1500, 4100]))
    np.testing.assert_allclose(found, [1.0, 1.0, np.exp(-1.0), 0.03], rtol=1e-6)


def test_its_program_does_not_grow_with_the_matrix():
    optimizer = kron(1e-3)
    assert program(optimizer, (4, 6)) == program(optimizer, (40, 60))


def test_bfloat16_parameters_have_a_state_of_float32():
    grads = jnp.asarray(gradients((4, 6), 3), jnp.bfloat16)
    found, state = updates(scale_by_kron(), grads)
    assert found.dtype == jnp.bfloat16
    kept = jax.tree.leaves((state.mu, state.factors))
    assert {x.dtype for x in kept} == {jnp.dtype("float32")}


def test_it_comes_nearer_than_adam_and_sgd():
    rates = np.logspace(-2, 0.5, 6)
    found = distances(lambda rate: kron(rate, update_probability=1.0), rates)
    adam = distances(optax.adam, rates)
    sgd = distances(lambda rate: optax.sgd(rate, 0.9), rates)
    assert found < 0.3 * min(adam, sgd)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(update_probability=0.0), "update_probability=0.0 must be above 0 and at most 1"),
        (dict(factor_learning_rate=1.0), "factor_learning_rate=1.0 must be above 0 and below 1"),
        (dict(initial_scale=0.0), "initial_scale=0.0 must be above 0"),
        (dict(b1=1.0), "b1=1.0 must be at least 0 and below 1"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        kron(1e-3, **settings)
