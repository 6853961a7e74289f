"""BlockLDLQ against a port of the official code, GPTQ, and its own theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.block_ldlq import block_ldlq, factor
from tests.algorithms.quantization import gptq_official
from tests.algorithms.quantization import quip_sharp_official as official


def layer(seed=0, o=7, i=48, n=96):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, i)) @ rng.normal(size=(i, i)) * np.exp(rng.normal(size=i) / 2)
    return 2 * rng.normal(size=(o, i)), x.T @ x


def nearest(block, index):
    """Whole numbers, and codes that tell which block they belong to."""
    rounded = jnp.round(block)
    return rounded, {"code": rounded.astype(jnp.int8), "block": index}


def ours(w, h, columns=8, damping=0.01, quantize=nearest):
    return block_ldlq(jnp.asarray(w), jnp.asarray(h), quantize, columns=columns, damping=damping)


def damped(h, damping):
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h))


@pytest.mark.parametrize(("columns", "damping"), [(1, 0.01), (8, 1e-4), (8, 1.0), (16, 0.01)])
@pytest.mark.some(2)
def test_equals_the_official_code(x64, columns, damping):
    w, h = layer(columns)
    regular = official.regularize(h, damping)
    expected = official.ldlq(w, official.block_ldl(regular, columns)[0], np.round, columns)
    approximation, codes = ours(w, h, columns, damping)
    np.testing.assert_array_equal(approximation, expected)
    np.testing.assert_array_equal(codes["block"], np.arange(48 // columns))
    in_order = np.moveaxis(np.asarray(codes["code"]), 0, 1).reshape(w.shape)
    np.testing.assert_array_equal(in_order, expected)


def test_one_column_at_a_time_is_gptq_back_to_front(x64):
    """Theorem 6 of Chee et al.: LDLQ and OPTQ are one procedure, written in two ways."""
    w, h = layer(1)
    u = gptq_official.inverse_factor(h[::-1, ::-1], 0.01)
    rest, expected = w[:, ::-1].copy(), np.zeros_like(w)
    for j in range(48):
        expected[:, j] = np.round(rest[:, j])
        rest -= np.outer((rest[:, j] - expected[:, j]) / u[j, j], u[j])
    np.testing.assert_array_equal(ours(w, h, columns=1)[0], expected[:, ::-1])


@pytest.mark.parametrize("columns", [1, 8])
def test_the_error_is_what_each_block_leaves_alone(x64, columns):
    """(W - Ŵ) L holds the blocks' own errors, so tr(ΔHΔᵀ) is their sum, weighted by D."""
    w, h = layer(2)

    def quantize(block, index):
        rounded = jnp.round(block)
        return rounded, block - rounded

    approximation, asked = ours(w, h, columns, quantize=quantize)
    own = np.moveaxis(np.asarray(asked), 0, 1)  # [o, blocks, c]
    delta = w - np.asarray(approximation)
    unit = np.asarray(factor(jnp.asarray(h), columns, 0.01)) + np.eye(48)
    np.testing.assert_allclose(delta @ unit, own.reshape(w.shape), atol=1e-10)
    _, d = official.block_ldl(damped(h, 0.01), columns)
    total = np.einsum("okc,kcd,okd->", own, d, own)
    np.testing.assert_allclose(total, np.trace(delta @ damped(h, 0.01) @ delta.T), rtol=1e-9)


@pytest.mark.parametrize("columns", [1, 8, 16])
def test_beats_rounding_without_feedback(columns):
    w, h = layer(3, o=16)
    approximation = ours(w.astype(np.float32), h.astype(np.float32), columns)[0]
    deltas = np.asarray(approximation, np.float64) - w, np.round(w) - w
    feedback, plain = (np.trace(d @ h @ d.T) for d in deltas)
    assert feedback < 0.75 * plain  # within a block nothing is made up for: wide ones gain less


def test_one_block_and_a_diagonal_matrix_are_plain_rounding(x64):
    w, h = layer(4)
    np.testing.assert_array_equal(ours(w, h, columns=48)[0], np.round(w))
    np.testing.assert_array_equal(ours(w, np.diag(np.diag(h)), columns=4)[0], np.round(w))


def test_dead_inputs_become_zero_and_leave_the_others_as_they_would_be(x64):
    w, h = layer(5)
    dead = [0, 13, 47]
    h[dead], h[:, dead] = 0, 0
    filled = h + np.diag((np.diag(h) == 0).astype(float))
    unit, _ = official.block_ldl(official.regularize(filled, 0.01), 8)
    cleared = w * (np.diag(h) != 0)
    approximation = np.asarray(ours(w, h)[0])
    np.testing.assert_array_equal(approximation, official.ldlq(cleared, unit, np.round, 8))
    assert not approximation[:, dead].any()


def test_a_matrix_of_zeros_stays_finite():
    w, h = layer(6)
    assert not np.asarray(ours(w, np.zeros_like(h))[0]).any()
    assert not np.asarray(ours(np.zeros_like(w), h)[0]).any()


def test_nan_where_the_matrix_is_not_positive_definite_and_damping_mends_it():
    w, _ = layer(7)
    h = np.ones((48, 48), np.float32)  # of rank one, exactly
    assert jnp.isnan(ours(w.astype(np.float32), h, damping=0.0)[0]).all()
    assert jnp.isfinite(ours(w.astype(np.float32), h)[0]).all()


def equations(jaxpr):
    """The number of equations of a traced graph, those inside its loops and calls included."""
    inner = (
        p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()), is_leaf=_graph)
    )
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner if _graph(p))


def _graph(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_the_graph_does_not_grow_with_width():
    def size(i):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, i), (i, i))]
        return equations(jax.make_jaxpr(ours)(*shapes).jaxpr)

    assert size(480) == size(48) < 200


@pytest.mark.parametrize("columns", [0, 7])
def test_refuses_blocks_that_do_not_divide(columns):
    sentence = rf"columns={columns} must be positive and divide .* w.shape=\(7, 48\)"
    with pytest.raises(ValueError, match=sentence):
        ours(*layer(8), columns=columns)
