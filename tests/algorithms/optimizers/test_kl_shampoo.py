"""KL-Shampoo and KL-SOAP against a port of the official code, and what their factors minimise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.kl_shampoo import kl_shampoo, scale_by_kl_shampoo
from algorithms.optimizers.soap import scale_by_soap
from tests.algorithms.optimizers import kl_shampoo_official as official
from tests.algorithms.optimizers.matrices import distances, gradients, orthogonal, program, updates

STEPS = 15
kl_soap = functools.partial(kl_shampoo, augmented=True)
BOTH = pytest.mark.parametrize("method", [kl_shampoo, kl_soap], ids=["kl_shampoo", "kl_soap"])


@BOTH
@pytest.mark.parametrize(
    "shape, ours, theirs, size",
    [
        ((6, 6), {}, {}, 1.0),
        ((5, 6), dict(frequency=3, eps=1e-3), dict(precondition_frequency=3, eps=1e-3), 1.0),
        ((6, 5), dict(frequency=1, b1=0.8, b2=0.9, initial=1.0, normalize=True),
         dict(precondition_frequency=1, betas=(0.8, 0.9), init_factor=1.0, normalize_grads=True),
         1.0),
        ((12, 12), dict(frequency=4, b2=0.5, max_inverse_root=11),
         dict(precondition_frequency=4, betas=(0.9, 0.5), max_clamp_value=11), 1e-3),
    ],
)  # fmt: skip
@pytest.mark.some(3)
def test_its_steps_are_those_of_the_official_code(x64, method, shape, ours, theirs, size):
    grads = size * gradients(shape, STEPS)
    port = official.KL(shape, using_klsoap=method is kl_soap, **theirs)
    expected = [port.step(g) for g in grads]
    found, state = updates(method(1.0, **ours), grads)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)
    assert not found[0].any()
    if size < 1:  # the small eigenvalues of some side were kept from falling
        assert any((values == 11.0**-2).any() for values in state[0].spectra)


@BOTH
def test_a_stack_is_its_matrices(x64, method):
    grads = gradients((3, 5, 6), STEPS)
    found, _ = updates(method(1.0, frequency=3), grads)
    for each in range(3):
        alone, _ = updates(method(1.0, frequency=3), grads[:, each])
        np.testing.assert_allclose(found[:, each], alone, rtol=1e-8, atol=1e-9)


@BOTH
def test_it_turns_with_the_problem(x64, method):
    grads = gradients((6, 6), 25)
    u, v = (orthogonal(6, np.random.default_rng(seed)) for seed in (1, 2))
    found, turned = (updates(method(1.0, frequency=5), g)[0] for g in (grads, u @ grads @ v.T))
    np.testing.assert_allclose(turned, u @ found @ v.T, atol=1e-7)


def divergence(grads, left, right):
    """KL of N(0, E[g gᵀ]) from N(0, s L ⊗ R), at its best s, but for what no factors change."""
    m, n = len(left), len(right)
    inner = np.einsum("tij,ik,tkl,lj->t", grads, np.linalg.inv(left), grads, np.linalg.inv(right))
    logs = n * np.linalg.slogdet(left)[1] + m * np.linalg.slogdet(right)[1]
    return logs + m * n * np.log(inner.mean())


def test_its_factors_are_nearer_to_the_covariance_than_those_of_shampoo(x64):
    """In KL, of gradients whose covariance is no Kronecker product; and where they stop."""
    few = gradients((5, 4), 60, seed=3) * np.random.default_rng(0).gamma(0.5, size=(60, 1, 1))
    many = np.tile(few, (60, 1, 1))
    _, kl = updates(scale_by_kl_shampoo(frequency=1, b2=0.999), many)
    _, shampoo = updates(scale_by_soap(frequency=1, factor_decay=0.999), many)
    left, right = (np.asarray(each) for each in kl.factors)
    assert divergence(few, left, right) < divergence(few, *shampoo.factors) - 0.1
    still = np.mean(few @ np.linalg.inv(right) @ few.swapaxes(1, 2), axis=0) / 4
    np.testing.assert_allclose(left, still, atol=0.05 * np.abs(still).max())
    for factor, values, q in zip(kl.factors, kl.spectra, kl.bases, strict=True):
        np.testing.assert_allclose((q * values) @ q.T, factor, atol=0.05 * np.abs(factor).max())


def test_a_wide_side_counts_as_white(x64):
    """With R = I, L is the mean of G Gᵀ / n, and the right side is not turned."""
    grads = gradients((4, 9), STEPS)
    found, state = updates(scale_by_kl_shampoo(max_size=8, b1=0.0), grads)
    assert state.factors.right is None and state.spectra.right is None
    mean = np.zeros((4, 4))
    for g in grads:
        mean = 0.98 * mean + 0.02 * g @ g.T / 9
    np.testing.assert_allclose(state.factors.left, mean, rtol=1e-10)
    by_columns, _ = updates(scale_by_kl_shampoo(max_size=8, b1=0.0), grads[:, :, ::-1])
    np.testing.assert_allclose(by_columns, found[:, :, ::-1], rtol=1e-7, atol=1e-9)


def test_kl_shampoo_keeps_no_second_moments():
    params = {"a": jnp.zeros((4, 6)), "b": jnp.zeros((2, 4, 6))}
    sizes = [
        sum(x.size for x in jax.tree.leaves(scale_by_kl_shampoo(augmented=a).init(params)))
        for a in (False, True)
    ]
    assert sizes[1] - sizes[0] == sum(p.size for p in params.values())


@BOTH
def test_its_program_does_not_grow_with_the_matrix(method):
    optimizer = method(1e-3)
    assert program(optimizer, (4, 6)) == program(optimizer, (40, 60))


@BOTH
def test_it_comes_nearer_than_adam_and_sgd(method):
    rates = np.logspace(-2, 0.5, 6)
    found = distances(lambda rate: method(rate, frequency=5), rates)
    adam = distances(optax.adam, rates)
    sgd = distances(lambda rate: optax.sgd(rate, 0.9), rates)
    assert found < 0.3 * min(adam, sgd)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(frequency=0), "frequency=0 must be at least 1"),
        (dict(initial=0.0), "initial=0.0 must be above 0"),
        (dict(b2=1.0), "b2=1.0 must be at least 0 and below 1"),
    ],
)
@BOTH
def test_bad_settings_are_named(method, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        method(1e-3, **settings)


@BOTH
def test_vectors_are_refused(method):
    with pytest.raises(ValueError, match="kl_s[a-z]* moves matrices alone"):
        method(1e-3).init({"b": jnp.zeros(3)})
