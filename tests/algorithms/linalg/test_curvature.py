"""Products with second derivatives against the matrices themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg

from algorithms.linalg import gauss_newton_product, hessian_product


@pytest.fixture
def network(x64):
    """A small one with a loss of logits: (parameters, model, loss of its outputs)."""
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(2, 3)))}
    x, y = jnp.asarray(rng.normal(size=(4, 6))), jnp.asarray(rng.integers(0, 2, 6))

    def model(params):
        return params["b"] @ jnp.tanh(params["a"] @ x)

    def loss(logits):
        return -jnp.mean(jax.nn.log_softmax(logits, 0)[y, jnp.arange(6)])

    return params, model, loss


def dense(product, params):
    """The matrix of `product(params)`."""
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def columns(params):
        matvec = product(params)
        return jax.vmap(lambda v: ravel_pytree(matvec(unravel(v)))[0])(jnp.eye(flat.size))

    return np.asarray(columns(params))


def test_the_hessian_is_the_dense_one(network):
    params, model, loss = network
    flat, unravel = ravel_pytree(params)
    exact = jax.jit(jax.hessian(lambda v: loss(model(unravel(v)))))(flat)
    found = dense(lambda p: hessian_product(lambda p: loss(model(p)), p), params)
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_gauss_and_newtons_is_jacobians_around_the_outputs_hessian(network):
    params, model, loss = network
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def exact(flat):
        jacobian = jax.jacobian(lambda v: model(unravel(v)).reshape(-1))(flat)
        outputs = model(unravel(flat))
        curve = jax.hessian(lambda o: loss(o.reshape(outputs.shape)))(outputs.reshape(-1))
        return jacobian.T @ curve @ jacobian

    found = dense(lambda p: gauss_newton_product(model, loss, p), params)
    np.testing.assert_allclose(found, exact(flat), atol=1e-12)
    assert np.linalg.eigvalsh(found)[0] > -1e-12
    hessian = dense(lambda p: hessian_product(lambda p: loss(model(p)), p), params)
    assert np.linalg.eigvalsh(hessian)[0] < -1e-3


def test_both_are_equal_where_the_model_is_linear(network):
    params, _, loss = network
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)))

    def model(params):
        return params["a"][:2] @ x + params["b"] @ x[:3]

    hessian = dense(lambda p: hessian_product(lambda p: loss(model(p)), p), params)
    found = dense(lambda p: gauss_newton_product(model, loss, p), params)
    np.testing.assert_allclose(hessian, found, atol=1e-12)


def test_a_damped_step_by_conjugate_gradients_is_the_solved_one(network):
    params, model, loss = network

    @jax.jit
    def damped_step(params):
        product = gauss_newton_product(model, loss, params)
        gradient = jax.grad(lambda p: loss(model(p)))(params)
        damped = lambda v: jax.tree.map(lambda g, v: g + 0.01 * v, product(v), v)  # noqa: E731
        return ravel_pytree(gradient)[0], ravel_pytree(cg(damped, gradient, tol=1e-12)[0])[0]

    gradient, step = damped_step(params)
    matrix = dense(lambda p: gauss_newton_product(model, loss, p), params) + 0.01 * np.eye(18)
    np.testing.assert_allclose(step, np.linalg.solve(matrix, gradient), atol=1e-8)


def test_vectors_take_the_parameters_types():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    product = hessian_product(lambda p: jnp.sum(p["w"].astype(jnp.float32) ** 3), params)
    np.testing.assert_allclose(product({"w": jnp.ones(3)})["w"], 6 * np.ones(3))
