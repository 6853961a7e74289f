"""SOAP against a port of the official code, Adam, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.eigenbases import eigenbasis
from algorithms.optimizers.kl_shampoo import kl_shampoo
from algorithms.optimizers.kron import kron
from algorithms.optimizers.soap import scale_by_soap, soap
from tests.algorithms.optimizers import soap_official as official
from tests.algorithms.optimizers.matrices import distances, gradients, orthogonal, program, updates

STEPS = 15


@pytest.mark.parametrize(
    "shape, ours, theirs",
    [
        ((6, 6), {}, {}),
        ((5, 6), dict(frequency=3), dict(precondition_frequency=3)),
        ((6, 5), dict(frequency=1, b1=0.9, b2=0.98),
         dict(precondition_frequency=1, betas=(0.9, 0.98))),
        ((5, 9), dict(frequency=2, max_size=8), dict(precondition_frequency=2, max_precond_dim=8)),
        ((9, 5), dict(frequency=2, max_size=8), dict(precondition_frequency=2, max_precond_dim=8)),
        ((6, 6), dict(frequency=4, factor_decay=0.7),
         dict(precondition_frequency=4, shampoo_beta=0.7)),
        ((6, 6), dict(frequency=4, normalize=True, eps=1e-3),
         dict(precondition_frequency=4, normalize_grads=True, eps=1e-3)),
        ((6, 6), dict(frequency=4, correct_bias=False),
         dict(precondition_frequency=4, correct_bias=False)),
    ],
)  # fmt: skip
def test_its_steps_are_those_of_the_official_code(x64, shape, ours, theirs):
    grads = gradients(shape, STEPS)
    port = official.Soap(shape, **theirs)
    expected = [port.step(g) for g in grads]
    found, _ = updates(soap(1.0, **ours), grads)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9)
    assert not found[0].any()
    assert found[1:].any(axis=(-1, -2)).all()


def test_a_stack_is_its_matrices(x64):
    grads = gradients((2, 3, 5, 6), STEPS)
    found, _ = updates(scale_by_soap(frequency=3, normalize=True), grads)
    for each in np.ndindex(2, 3):
        alone, _ = updates(scale_by_soap(frequency=3, normalize=True), grads[:, *each])
        np.testing.assert_allclose(found[:, *each], alone, rtol=1e-9, atol=1e-10)


def test_without_bases_it_is_adam_from_the_second_gradient(x64):
    grads = gradients((5, 7), STEPS)
    found, state = updates(soap(0.1, max_size=0, b1=0.9, b2=0.99, eps=1e-20), grads)
    adam, _ = updates(optax.adam(0.1, b1=0.9, b2=0.99, eps=1e-20), grads[1:])
    np.testing.assert_allclose(found[1:], adam, rtol=1e-10)
    assert jax.tree.leaves((state[0].factors, state[0].bases)) == []


def test_it_turns_with_the_problem(x64):
    """G -> U G Vᵀ turns its updates alike; Adam's axes are fixed."""
    grads = gradients((6, 6), 25)
    u, v = (orthogonal(6, np.random.default_rng(seed)) for seed in (1, 2))
    apart = []
    for optimizer in (scale_by_soap(frequency=5), optax.scale_by_adam()):
        found, turned = (updates(optimizer, g)[0] for g in (grads, u @ grads @ v.T))
        apart.append(np.abs(turned - u @ found @ v.T).max())
    assert apart[0] < 1e-7
    assert apart[1] > 0.1


def test_its_bases_become_eigenvectors(x64):
    """Of the same gradients' mean outer products, L and R: by power iteration."""
    few = gradients((5, 6), 6)
    _, state = updates(scale_by_soap(frequency=1, factor_decay=0.999), np.tile(few, (200, 1, 1)))
    for factor, q in zip(state.factors, state.bases, strict=True):
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
        turned = q.T @ factor @ q
        apart = turned - np.diag(np.diag(turned))
        assert np.abs(apart).max() < 1e-3 * np.abs(turned).max()
        assert (np.diff(np.diag(turned)) < 0).all()


def test_a_first_basis_is_of_eigenvectors_whatever_the_rank(x64):
    g = gradients((3, 8, 5), 1)[0]
    factor = jnp.asarray(g @ g.swapaxes(-1, -2))
    q = eigenbasis(factor, 5)
    np.testing.assert_allclose(q.mT @ q, np.broadcast_to(np.eye(8), q.shape), atol=1e-12)
    turned = np.asarray(q.mT @ factor @ q)
    values = np.linalg.eigvalsh(factor)[:, None, ::-1] * np.eye(8)
    np.testing.assert_allclose(turned, values, atol=1e-9)


def test_rounding_does_not_choose_the_basis_of_a_null_space():
    g = gradients((40, 4), 1)[0]
    found = [
        eigenbasis(jnp.asarray(a @ a.T, jnp.float32), 4)
        for a in (g, g * (1 + 1e-6 * np.random.default_rng(0).normal(size=g.shape)))
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


def test_its_program_does_not_grow_with_the_matrix():
    optimizer = soap(1e-3)
    assert program(optimizer, (4, 6)) == program(optimizer, (40, 60))


@pytest.mark.parametrize("make", [soap, kl_shampoo, kron])
def test_weights_decay_apart_from_the_gradients(make):
    w, g = jnp.full((4, 6), 2.0), jnp.asarray(gradients((4, 6), 1)[0], jnp.float32)
    found = [
        optimizer.update(g, optimizer.init(w), w)[0]
        for optimizer in (make(0.1, weight_decay=0.5), make(0.1))
    ]
    np.testing.assert_allclose(found[0] - found[1], -0.1 * 0.5 * w, rtol=1e-5)


def test_bfloat16_parameters_have_a_state_of_float32():
    grads = jnp.asarray(gradients((4, 6), 3), jnp.bfloat16)
    found, state = updates(scale_by_soap(), grads)
    assert found.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state[1:])} == {jnp.dtype("float32")}


def test_it_comes_nearer_than_adam_and_sgd():
    """On a quadratic that is badly conditioned in axes of its own, each at its best rate."""
    rates = np.logspace(-2, 0.5, 6)
    found = distances(lambda rate: soap(rate, frequency=5), rates)
    adam = distances(optax.adam, rates)
    sgd = distances(lambda rate: optax.sgd(rate, 0.9), rates)
    assert found < 0.3 * min(adam, sgd)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(frequency=0), "frequency=0 must be at least 1"),
        (dict(max_size=-1), "max_size=-1 must not be negative"),
        (dict(eps=0.0), "eps=0.0 must be above 0"),
        (dict(b1=1.0), "b1=1.0 must be at least 0 and below 1"),
        (dict(factor_decay=-0.1), "factor_decay=-0.1 must be at least 0 and below 1"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        soap(1e-3, **settings)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"soap moves matrices alone, and b has shape \(3,\)"):
        soap(1e-3).init({"b": jnp.zeros(3)})
