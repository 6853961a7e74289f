"""Entropic plans against a slow Sinkhorn, linear programming and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from algorithms.transport import sinkhorn
from tests.algorithms.test_clustering import equations


def problem(n=6, m=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(n, m)), rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))


def slow(cost, a, b, epsilon, steps=20_000):
    """Cuturi's iterations as the paper has them, on the kernel itself."""
    kernel = np.exp(-cost / epsilon)
    v = np.ones(len(b))
    for _ in range(steps):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_is_a_slow_sinkhorns(x64):
    cost, a, b = problem()
    found = sinkhorn(*map(jnp.asarray, (cost, a, b)), epsilon=0.1, tolerance=1e-12)
    np.testing.assert_allclose(found.plan, slow(cost, a, b, 0.1), rtol=1e-9)
    again = np.exp((np.asarray(found.f)[:, None] + np.asarray(found.g) - cost) / 0.1)
    np.testing.assert_allclose(found.plan, again, rtol=1e-12)


def test_little_entropy_costs_what_linear_programming_finds(x64):
    """Also where the kernel would underflow: exp(-0.9 / 1e-3)."""
    cost, a, b = problem(5, 5)
    margins = np.vstack([np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))])
    best = linprog(cost.ravel(), A_eq=margins, b_eq=np.concatenate([a, b])).fun
    arrays = [jnp.asarray(x) for x in (cost, a, b)]
    found = sinkhorn(*arrays, epsilon=1e-3, tolerance=1e-7, steps=100_000)
    assert found.error <= 1e-7
    paid = np.sum(np.asarray(found.plan) * cost)
    assert best - 1e-6 < paid < best + 1e-3 * np.log(25)  # what the entropy can be worth


def test_the_error_is_that_of_the_rows_and_says_when_steps_were_too_few():
    cost, a, b = (jnp.asarray(x, jnp.float32) for x in problem())
    few = sinkhorn(cost, a, b, epsilon=0.02, steps=3)
    assert few.steps == 3 and few.error > 1e-2
    plan = np.asarray(few.plan)
    np.testing.assert_allclose(few.error, np.abs(plan.sum(1) - a).sum(), rtol=1e-4)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-6)
    enough = sinkhorn(cost, a, b, epsilon=0.02)
    assert enough.error <= 1e-3 and 3 < enough.steps < 2000


def test_each_problem_of_a_batch_takes_its_own_steps(x64):
    cost, a, b = map(jnp.asarray, problem())
    batch = jnp.stack([cost, 4 * cost])[None]
    found = sinkhorn(batch, a, b, epsilon=0.1)
    assert found.plan.shape == (1, 2, 6, 4) and found.steps[0, 0] < found.steps[0, 1]
    for n in range(2):
        alone = sinkhorn(batch[0, n], a, b, epsilon=0.1)
        assert alone.steps == found.steps[0, n]
        np.testing.assert_allclose(found.plan[0, n], alone.plan, atol=1e-12)


@pytest.mark.parametrize("which", ["cost", "a", "b"])
def test_gradients_are_those_of_finite_differences(x64, which):
    """Of plan and potentials; masses move so that they sum to 1 still."""
    rng, number = np.random.default_rng(1), ["cost", "a", "b"].index(which)
    arguments, weights = problem(), rng.normal(size=(6, 4))
    direction = rng.normal(size=arguments[number].shape)
    direction -= 0 if which == "cost" else direction.mean()

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        given = [*map(jnp.asarray, arguments[:number]), x, *arguments[number + 1 :]]
        found = sinkhorn(*map(jnp.asarray, given), epsilon=0.1, tolerance=1e-13, steps=10_000)
        return jnp.sum(weights * found.plan**2) + jnp.sum(found.f**2) + jnp.sum(jnp.sin(found.g))

    step = 1e-6 * direction
    expected = (loss(arguments[number] + step)[0] - loss(arguments[number] - step)[0]) / 2e-6
    found = np.sum(loss(arguments[number])[1] * direction)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_masses_of_zero_are_served_by_nothing(x64):
    cost, a, b = problem()
    a[2] = 0
    a /= a.sum()
    arrays = [jnp.asarray(x) for x in (cost, a, b)]
    found = sinkhorn(*arrays, epsilon=0.1, tolerance=1e-10)
    kept = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(found.plan[2], 0)
    np.testing.assert_allclose(np.asarray(found.plan)[kept], slow(cost[kept], a[kept], b, 0.1))
    loss = lambda cost: jnp.sum(sinkhorn(cost, *arrays[1:], epsilon=0.1).plan ** 2)  # noqa: E731
    assert np.isfinite(jax.jit(jax.grad(loss))(arrays[0])).all()


def test_the_graph_grows_neither_with_width_nor_with_steps():
    def size(n, steps):
        run = lambda cost: jnp.sum(sinkhorn(cost, epsilon=0.1, steps=steps).plan ** 2)  # noqa: E731
        return equations(jax.make_jaxpr(jax.grad(run))(jnp.ones((n, n))).jaxpr)

    assert size(8, 10) == size(64, 1000) < 600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epsilon=0.0), "epsilon=0.0"),
        (dict(epsilon=0.1, tolerance=0.0), "tolerance=0.0 must be positive"),
        (dict(epsilon=0.1, steps=0), "steps=0 at least"),
    ],
)
def test_refuses_what_means_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(jnp.ones((2, 2)), **options)
