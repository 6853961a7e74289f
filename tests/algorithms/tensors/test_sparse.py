"""Weights without their zeros: one program unpacks whatever is left of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import walk
from algorithms.formats import integer
from algorithms.numerics import running_count
from algorithms.pruning.patterns import Pattern
from algorithms.quantization.rtn import rtn
from algorithms.tensors import ExpertsTensor


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (64,), (3, 33), (2, 2, 100)])
def test_running_counts_are_cumulative_sums(shape):
    mask = np.random.default_rng(0).random(shape) < 0.4
    np.testing.assert_array_equal(running_count(jnp.asarray(mask)), np.cumsum(mask, -1))


def pruned(w, sparsity, codes):
    pattern = Pattern(sparsity=sparsity)
    mask = pattern.of_all(jnp.abs(w))
    grid = rtn(format=integer(bits=3, group_size=8)).compress(w, None) if codes else w
    return pattern.tensor(grid, mask), mask


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("experts", [0, 2])
def test_one_program_unpacks_all_sparsities(codes, experts):
    """Of numbers and of codes, of one matrix and of a mixture's."""
    w = jax.random.normal(jax.random.key(0), (max(experts, 1), 12, 24))
    before = walk._dense._cache_size()
    for sparsity in (0.0, 0.3, 0.71):
        found = [pruned(each, sparsity, codes) for each in w]
        tensors, masks = zip(*found, strict=True)
        expected = jnp.stack([tensor.dequantize() for tensor in tensors])
        for tensor, mask in found:
            assert tensor.values.shape[0] < tensor.padded().values.shape[0] or sparsity == 0
            assert not np.any(np.asarray(tensor.dequantize())[~np.asarray(mask)])
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tensors)
        tensor = ExpertsTensor(together) if experts else tensors[0]
        actual = walk.dense(tensor, dtype=jnp.float32)
        np.testing.assert_array_equal(actual, expected if experts else expected[0])
    assert walk._dense._cache_size() == before + 1
