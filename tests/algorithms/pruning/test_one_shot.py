"""Magnitude, Wanda and SparseGPT against ports of the official codes, and what theory says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import hessian
from algorithms.formats import integer, nvfp4
from algorithms.pruning import wanda as wanda_of
from algorithms.pruning.magnitude import magnitude
from algorithms.pruning.sparsegpt import sparsegpt
from algorithms.pruning.wanda import wanda
from algorithms.tensors import BlockSparseTensor, SparseTensor
from tests.algorithms.pruning import sparsegpt_official as official


def layer(seed=0, o=24, i=40, n=200):
    """Correlated inputs of different spread, as activations are."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(i, i)) / 4 + np.eye(i)
    x = rng.normal(size=(n, i)) @ mix * np.exp(rng.normal(size=i))
    return rng.normal(size=(o, i)), x


def compressed(method, w, x):
    stats = None
    if method.observe is not None:
        stats = jax.tree.map(lambda a: a.astype(w.dtype), method.init(w.shape[1]))
        stats = method.observe(stats, jnp.asarray(x, w.dtype))
    tensor = jax.jit(method.compress)(jnp.asarray(w), stats)
    tensor.validate()
    return tensor


def loss(w, found, x):
    return np.sum(((np.asarray(w) - np.asarray(found)) @ x.T) ** 2)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("block_size", [16, 128])
def test_sparsegpt_is_the_official_code(x64, dead, block_size):
    """It removes one weight more of each block than the fraction says: so do we, when told."""
    w, x = layer()
    if dead:
        x[:, [3, 20]] = 0
    h = x.T @ x
    blocks = [min(block_size, 40 - start) for start in range(0, 40, block_size)]
    expected = official.sparsegpt(w, h, sparsity=0.5, blocksize=block_size)
    assert (expected == 0).sum() == sum(24 * b // 2 + 1 for b in blocks)
    method = sparsegpt(sparsity=0.5 + 1 / 24 / blocks[0], block_size=block_size, dtype="float64")
    if len(set(blocks)) == 1:
        np.testing.assert_allclose(compressed(method, w, x).dequantize(), expected, atol=1e-9)
    exact = compressed(sparsegpt(block_size=block_size, dtype="float64"), w, x).dequantize()
    assert (exact == 0).sum() == 24 * 40 // 2
    assert np.mean((np.asarray(exact) == 0) == (expected == 0)) > 0.9


@pytest.mark.parametrize("keep, of", [(2, 4), (1, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("block_size", [8, 20, 128])
def test_sparsegpt_of_blocks_is_the_official_code(x64, keep, of, block_size):
    w, x = layer(1)
    expected = official.sparsegpt(
        w, x.T @ x, sparsity=0.5, prunen=of - keep, prunem=of, blocksize=block_size // of * of or of
    )
    method = sparsegpt(keep=keep, block=of, block_size=block_size, dtype="float64")
    tensor = compressed(method, w, x)
    assert isinstance(tensor, BlockSparseTensor)
    np.testing.assert_allclose(tensor.dequantize(), expected, atol=1e-9)


@pytest.mark.parametrize("keep, of", [(None, None), (2, 4)])
def test_sparsegpt_with_a_format_is_the_official_code_with_a_quantizer(x64, keep, of):
    w, x = layer(2)
    format = integer(bits=4, group_size=None, scale_dtype=None)
    grid = format.fit(jnp.asarray(w))
    numbers = (np.asarray(grid.scale)[:, 0], np.asarray(grid.zero, float)[:, 0], 15)
    chosen = {"sparsity": 0.5 + 1 / w.size} if keep is None else {"keep": keep, "block": of}
    ports = {} if keep is None else {"prunen": of - keep, "prunem": of}
    expected = official.sparsegpt(w, x.T @ x, sparsity=0.5, grid=numbers, **ports)
    tensor = compressed(sparsegpt(format=format, **chosen), w, x)
    np.testing.assert_allclose(tensor.dequantize(), expected, atol=1e-9)
    assert 4 * w.size / 2 < tensor.storage_bits() < 4 * w.size / 2 + w.size + 200 * len(w)


@pytest.mark.parametrize("pattern", [{}, {"keep": 2, "block": 4}], ids=str)
@pytest.mark.parametrize(
    "format", [None, integer(bits=4, group_size=None, scale_dtype=None)], ids=str
)
def test_activation_order_is_the_same_walk_over_columns_put_in_that_order(x64, pattern, format):
    w, x = layer(11)
    width = pattern.get("block", 1)
    blocks = np.argsort(-(x**2).sum(0).reshape(-1, width).sum(1))
    order = (blocks[:, None] * width + np.arange(width)).reshape(-1)
    settings = {**pattern, "format": format, "block_size": 16, "dtype": "float64"}
    found = compressed(sparsegpt(activation_order=True, **settings), w, x).dequantize()
    sorted_ = compressed(sparsegpt(**settings), w[:, order], x[:, order]).dequantize()
    np.testing.assert_allclose(np.asarray(found)[:, order], sorted_, atol=1e-9)


@pytest.mark.parametrize("keep, of", [(None, None), (2, 4), (4, 8)])
def test_wanda_is_the_official_code(x64, keep, of):
    w, x = layer(3)
    chosen = {"sparsity": 0.3} if keep is None else {"keep": keep, "block": of}
    ports = {} if keep is None else {"prune_n": of - keep, "prune_m": of}
    expected = official.wanda(w, (x**2).sum(0), sparsity=0.3, **ports)
    found = compressed(wanda(dtype="float64", **chosen), w, x).dequantize()
    np.testing.assert_array_equal(found, expected)


def test_magnitude_is_the_official_code(x64):
    w, x = layer(4)
    found = compressed(magnitude(sparsity=0.5 + 1 / w.size, dtype="float64"), w, x).dequantize()
    np.testing.assert_array_equal(found, official.magnitude(w, sparsity=0.5))
    rows = compressed(magnitude(within="row"), w, x).dequantize()
    np.testing.assert_array_equal((rows == 0).sum(1), 20)


@pytest.mark.parametrize("pattern", [{}, {"keep": 2, "block": 4}], ids=str)
def test_each_knows_more_than_the_one_before(pattern):
    w, x = layer(5)
    losses = [
        loss(w, compressed(method, jnp.float32(w), x).dequantize(), x)
        for method in (sparsegpt(**pattern), wanda(**pattern), magnitude(**pattern))
    ]
    assert losses[0] < 0.8 * losses[1] and losses[1] < 0.8 * losses[2]


def test_what_sparsegpt_leaves_is_near_the_best_and_never_below_it(x64):
    """On one row of eight weights: all choices of four, each with its least-squares weights."""
    rng = np.random.default_rng(6)
    ratios = []
    for _ in range(8):
        w, x = layer(int(rng.integers(1 << 30)), o=1, i=8)
        h = x.T @ x
        best = np.inf
        for chosen in itertools.combinations(range(8), 4):
            at = list(chosen)
            v = np.zeros(8)
            v[at] = np.linalg.solve(h[np.ix_(at, at)], h[at] @ w[0])
            best = min(best, loss(w, v[None], x))
        found = compressed(sparsegpt(damping=0.0, dtype="float64"), w, x).dequantize()
        ratios.append(loss(w, found, x) / best)
    assert min(ratios) > 1 - 1e-9 and np.median(ratios) < 1.5


def test_the_last_columns_take_up_what_least_squares_says(x64):
    """All weights of the first columns go, none of the others: those are then the optimum."""
    w, x = layer(7, o=6, i=12)
    h = x.T @ x
    w[:, :4] *= 1e-3  # so that they are the ones that go
    method = sparsegpt(sparsity=1 / 3, damping=0.0, dtype="float64")
    found = np.asarray(compressed(method, w, x).dequantize())
    assert not found[:, :4].any()
    expected = np.linalg.solve(h[4:, 4:], h[4:] @ w.T).T
    np.testing.assert_allclose(found[:, 4:], expected, rtol=1e-6, atol=1e-9)


def test_a_site_is_measured_as_if_its_channels_were_uncorrelated(x64):
    w, x = map(jnp.asarray, layer(8))
    x = jnp.linalg.qr(x)[0] * jnp.arange(1.0, 41)  # they are
    stats = wanda_of.observe(wanda_of.NormStats(jnp.zeros(40)), x)
    tensor = wanda().compress(w, stats)
    gram = hessian.observe(hessian.HessianStats(jnp.zeros((40, 40))), x)
    expected = hessian.output_error(w, tensor.dequantize(), gram)
    np.testing.assert_allclose(wanda_of.error(w, tensor.dequantize(), stats), expected, rtol=1e-6)


def test_rows_are_weighed_together_or_alone():
    assert not magnitude().stacked and magnitude(within="row").stacked
    assert not sparsegpt().stacked and sparsegpt(keep=2, block=4).stacked and wanda().stacked


@pytest.mark.parametrize("format", [None, integer(group_size=20), nvfp4(group_size=20)], ids=str)
@pytest.mark.parametrize("pattern", [{}, {"keep": 2, "block": 4}, {"keep": 3, "block": 8}], ids=str)
def test_what_is_stored_comes_apart_by_rows(pattern, format):
    w, x = layer(9)
    tensor = compressed(sparsegpt(format=format, **pattern), jnp.float32(w), x)
    pieces = tensor.split([10, 14])
    for piece in pieces:
        piece.validate()
    joined = jnp.concatenate([piece.dequantize() for piece in pieces])
    np.testing.assert_array_equal(joined, tensor.dequantize())
    zeros = np.asarray(joined == 0).sum()
    assert zeros >= (w.size * 5 // 8 if pattern.get("block") == 8 else w.size // 2)


def test_groups_that_cut_blocks_are_stored_by_their_bits():
    w, x = layer(10)
    tensor = compressed(
        sparsegpt(keep=3, block=8, format=integer(group_size=20)), jnp.float32(w), x
    )
    assert isinstance(tensor, SparseTensor) and tensor.row_count == 15


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: magnitude(within="model"), "within='model' must be layer or row"),
        (lambda: sparsegpt(damping=-1.0), "damping=-1.0 must not be negative"),
        (lambda: sparsegpt(block_size=0), "block_size=0 must be positive"),
        (lambda: sparsegpt(sparsity=1.5), "sparsity=1.5 must be from 0 to below 1"),
    ],
)
def test_settings_outside_their_ranges_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()
