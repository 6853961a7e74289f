"""OATS against a port of the official code, what its two matrices are, and either alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.low_rank.asvd import asvd
from algorithms.pruning.oats import OATSConfig, decompose, oats, shares
from algorithms.pruning.wanda import wanda
from algorithms.tensors import BlockSparseTensor, LowRankTensor, SparseTensor, SumTensor
from tests.algorithms.pruning import oats_official as official
from tests.algorithms.pruning.test_one_shot import compressed, layer
from tests.algorithms.quantization.test_gptq import equations


def weighed(w, found, x):
    """‖(W - Ŵ) D‖² / ‖W D‖²."""
    squares = (x**2).sum(0)
    return np.sum((w - np.asarray(found)) ** 2 * squares) / np.sum(w**2 * squares)


@pytest.mark.parametrize("keep, block", [(None, None), (2, 8)])
@pytest.mark.parametrize("iterations", [1, 12])
def test_it_is_the_official_code(x64, keep, block, iterations):
    w, x = layer(0)
    blocks = {} if keep is None else {"prune_n": keep, "prune_m": block}
    s, low = official.oats(w, (x**2).mean(0), rank_ratio=0.3, iterations=iterations, **blocks)
    settings = {"keep": keep, "block": block, "rank_ratio": 0.3, "iterations": iterations}
    tensor = compressed(oats(**settings, orthogonal_iterations=30, dtype="float64"), w, x)
    np.testing.assert_allclose(tensor.base.dequantize(), s, atol=1e-8)
    np.testing.assert_allclose(tensor.correction.dequantize(), low, atol=1e-8)
    few = compressed(oats(**settings, dtype="float64"), w, x).dequantize()
    assert abs(weighed(w, few, x) / weighed(w, s + low, x) - 1) < 1e-2


@pytest.mark.parametrize("keep, block", [(None, None), (2, 8)])
def test_it_keeps_what_it_says(keep, block):
    w, x = layer(1, o=64, i=96)
    tensor = compressed(oats(keep=keep, block=block, iterations=2), w.astype(np.float32), x)
    assert isinstance(tensor, SumTensor) and isinstance(tensor.correction, LowRankTensor)
    assert isinstance(tensor.base, SparseTensor if keep is None else BlockSparseTensor)
    kept = int(tensor.base.alive().sum())
    of_low_rank = tensor.correction.rank * (64 + 96)
    budget = w.size * (0.5 if keep is None else 0.25 / 0.75)
    assert kept == (w.size * 0.375 if keep is None else w.size / 4)
    assert budget - (64 + 96) < kept + of_low_rank <= budget
    assert 16 * (kept + of_low_rank) < tensor.storage_bits() <= 16 * budget + w.size


def test_each_turn_lowers_the_error_and_it_ends_below_either_alone():
    w, x = layer(2, o=32, i=48)
    w = (w + 3 * np.outer(*np.random.default_rng(0).normal(size=(2, 48)))[:32]).astype("f4")
    left = [
        weighed(w, compressed(oats(iterations=n, orthogonal_iterations=8), w, x).dequantize(), x)
        for n in (1, 4, 16)
    ]
    assert left[0] > left[1] > left[2]
    for other in (wanda(sparsity=0.5), asvd(ratio=0.5, alpha=1)):
        stats = other.observe(other.init(48), jnp.asarray(x, jnp.float32))
        assert left[2] < weighed(w, other.compress(jnp.asarray(w), stats).dequantize(), x)


def test_finite_on_dead_inputs_zero_rows_and_zero_layers():
    """Where the official code divides by zero."""
    w, x = layer(3)
    x[:, 5], w[3] = 0, 0
    w = w.astype(np.float32)
    for inputs in (x, 0 * x):
        dense = compressed(oats(iterations=4), w, inputs).dequantize()
        assert jnp.isfinite(dense).all() and not dense[3].any()
    assert not compressed(oats(iterations=4), 0 * w, x).dequantize().any()


def test_the_graph_grows_with_neither_width_nor_turns():
    def size(i, iterations):
        pattern, ranks = shares(0.5, None, None, 0.25)
        config = OATSConfig(pattern=pattern, ranks=ranks, iterations=iterations)
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((40, i), (i,))]
        return equations(jax.make_jaxpr(lambda w, d: decompose(w, d, config))(*shapes).jaxpr)

    assert size(200, 80) == size(100, 3) < 400


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"rank_ratio": 0.0}, "rank_ratio=0.0 must be .*algorithm=wanda.*algorithm=asvd"),
        ({"rank_ratio": 1.0}, "rank_ratio=1.0 must be between 0 and 1"),
        ({"sparsity": 1.5}, "sparsity=1.5 must be from 0"),
        ({"keep": 3, "block": 4, "rank_ratio": 0.5}, "are 1.50 times the parameters of a weight"),
        ({"iterations": 0}, "iterations=0 must be positive"),
        ({"orthogonal_iterations": 0}, "orthogonal_iterations=0 must be positive"),
    ],
)
def test_refuses_settings_that_mean_nothing(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        oats(**settings)
