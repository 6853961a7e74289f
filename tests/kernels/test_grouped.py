"""Products of rows with their experts' matrices, against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped import by_expert, grouped_matmul


def port(x, w, counts):
    """Row by row."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return np.stack([x[n].astype(np.float64) @ w[e] for n, e in enumerate(owner)])


def example(counts, i=5, o=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(sum(counts), i)).astype(np.float32)
    return x, rng.normal(size=(len(counts), i, o)).astype(np.float32), np.array(counts, np.int32)


@pytest.mark.parametrize(
    "counts",
    [
        [4, 3, 5],
        [0, 0, 7],
        [7, 0, 0],
        [1],
        [0, 1, 0, 0],  # fewer rows than experts, as when a single token is decoded
        [129, 0, 300, 1],  # more than a block of one expert, and of different lengths
        [64, 64],
    ],
)
def test_each_row_meets_its_own_expert(counts):
    x, w, n = example(counts)
    found = jax.jit(grouped_matmul)(x, w, n)
    np.testing.assert_allclose(found, port(x, w, n), rtol=1e-5, atol=1e-5)


def test_the_block_form_is_that_of_jax():
    x, w, n = map(jnp.asarray, example([9, 0, 22, 3]))
    blocks = by_expert(x, n, lambda rows, e: rows @ w[e])
    np.testing.assert_allclose(blocks, jax.lax.ragged_dot(x, w, n), rtol=1e-5, atol=1e-5)


def test_gradients_reach_rows_and_matrices():
    x, w, n = example([3, 0, 4])
    rows = jnp.asarray(n)
    dx, dw = jax.grad(lambda x, w: (grouped_matmul(x, w, rows) ** 2).sum(), (0, 1))(x, w)
    y, owner = 2 * port(x, w, n), np.repeat(np.arange(3), n)
    np.testing.assert_allclose(dx, [y[r] @ w[e].T for r, e in enumerate(owner)], rtol=1e-4)
    expected = [x[owner == e].T @ y[owner == e] for e in range(3)]
    np.testing.assert_allclose(dw, np.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 8, 64])
def test_the_work_does_not_grow_with_the_experts(experts):
    """At most one block more for each than its rows fill."""
    x, w, n = example([512 // experts] * experts)
    graph = jax.make_jaxpr(lambda x, n: by_expert(x, n, lambda rows, e: rows @ jnp.asarray(w)[e]))
    (loop,) = [eqn for eqn in graph(x, n).eqns if eqn.primitive.name == "scan"]
    rows = loop.params["jaxpr"].out_avals[-1].shape[0]
    assert loop.params["length"] * rows <= 2 * 512
