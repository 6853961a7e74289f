"""Prune, then quantize: zeros stay, what is left is on the grid, who knows of them does better."""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import hessian
from algorithms.formats import integer
from algorithms.low_rank.eora import eora
from algorithms.pruning.magnitude import magnitude
from algorithms.pruning.pruned import pruned
from algorithms.pruning.sparsegpt import sparsegpt
from algorithms.pruning.wanda import wanda
from algorithms.quantization.aqlm import aqlm
from algorithms.quantization.gptq import gptq
from algorithms.quantization.rtn import rtn
from algorithms.tensors import BlockSparseTensor
from tests.algorithms.pruning.test_one_shot import compressed, layer, loss

FORMAT = integer(bits=4, group_size=20)
PRUNERS = {
    "magnitude": magnitude(), "wanda": wanda(), "sparsegpt": sparsegpt(),
    "2:4": wanda(keep=2, block=4), "3:8": magnitude(keep=3, block=8),
}  # fmt: skip


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("rounds", [rtn, gptq])
@pytest.mark.some(6)
def test_zeros_stay_and_what_is_left_is_on_the_grid(pruner, rounds):
    w, x = layer(20)
    w = jnp.float32(w)
    left = compressed(PRUNERS[pruner], w, x)
    found = compressed(pruned(PRUNERS[pruner], rounds(format=FORMAT)), w, x)
    np.testing.assert_array_equal(found.alive(), left.alive())
    assert isinstance(found, BlockSparseTensor) is (pruner == "2:4")  # groups of 20 cut blocks of 8
    dense = np.asarray(found.dequantize())
    assert not dense[~np.asarray(left.alive())].any()
    grid = FORMAT.fit(left.dequantize())
    np.testing.assert_allclose(FORMAT.nearest(jnp.asarray(dense), grid), dense, atol=1e-6)
    assert found.storage_bits() < left.storage_bits() / 2 + 40 * grid.scale.size
    if rounds is rtn:
        rounded = FORMAT.round(left.dequantize(), grid).dequantize()
        # Compilers may contract a product and a sum, which moves what lies on a tie.
        assert (dense == jnp.where(left.alive(), rounded, 0)).mean() > 0.98


def test_gptq_within_zeros_is_its_walk_with_zeros_in_place_of_their_codes(x64):
    """Column by column, in the plainest way."""
    w, x = layer(21)
    format = integer(bits=3, group_size=None, scale_dtype=None)
    left = compressed(wanda(dtype="float64"), w, x)
    method = pruned(wanda(dtype="float64"), gptq(format=format, activation_order=False))
    found = compressed(method, w, x).dequantize()
    mask, w = np.asarray(left.alive()), np.array(left.dequantize())
    grid = format.fit(jnp.asarray(w))
    scale, zero = np.asarray(grid.scale)[:, 0], np.asarray(grid.zero, float)[:, 0]
    u = np.asarray(hessian.inverse_factor(jnp.asarray(x.T @ x), 0.01))
    for j in range(40):
        q = (np.clip(np.round(w[:, j] / scale) + zero, 0, 7) - zero) * scale
        q = np.where(mask[:, j], q, 0)
        w[:, j + 1 :] -= np.outer((w[:, j] - q) / u[j, j], u[j, j + 1 :])
        w[:, j] = q
    np.testing.assert_allclose(found, w, atol=1e-9)


def test_one_walk_is_no_worse_than_two_and_both_are_better_than_cutting_off():
    plain = gptq(format=FORMAT, activation_order=False)
    cut = plain._replace(compress_sparse=None)
    methods = sparsegpt(format=FORMAT), pruned(sparsegpt(), plain), pruned(sparsegpt(), cut)
    losses = np.zeros((12, len(methods)))
    for seed in range(len(losses)):
        w, x = layer(30 + seed)
        w = jnp.float32(w)
        losses[seed] = [loss(w, compressed(method, w, x).dequantize(), x) for method in methods]
    joint, sequence, cut_off = np.log(losses).mean(0)
    assert joint < sequence + 0.03 and sequence < cut_off


def test_statistics_are_kept_once_where_both_want_the_same():
    method = pruned(sparsegpt(), gptq())
    assert method.observe is hessian.observe and not method.stacked
    assert pruned(magnitude(), gptq()).observe is hessian.observe
    both = pruned(wanda(), gptq())
    assert both.stacked and both.observe is not hessian.observe
    w, x = layer(22)
    stats = both.observe(both.init(40), jnp.float32(x).at[:, 3].set(0))
    assert both.notes(stats) == {"dead_inputs": 1}


def test_errors_are_measured_by_what_has_been_seen():
    w, x = layer(23)
    w, x = jnp.float32(w), jnp.float32(x)
    method = pruned(sparsegpt(), rtn(format=FORMAT))
    stats = method.observe(method.init(40), x)
    dense = method.compress(w, stats).dequantize()
    expected = loss(w, dense, np.asarray(x)) / loss(w, 0 * dense, np.asarray(x))
    assert method.error(w, dense, stats) == pytest.approx(expected, rel=1e-3)


def test_a_correction_goes_around_both():
    w, x = layer(24)
    w = jnp.float32(w)
    inner = pruned(wanda(), gptq(format=FORMAT))
    plain = loss(w, compressed(inner, w, x).dequantize(), x)
    assert loss(w, compressed(eora(rank=4)(inner), w, x).dequantize(), x) < 0.8 * plain


def test_what_does_not_go_together_is_refused():
    w, x = layer(25)
    with pytest.raises(
        ValueError, match="pruning gave a QuantizedTensor, of which nothing is gone"
    ):
        compressed(pruned(rtn(format=FORMAT), gptq(format=FORMAT)), jnp.float32(w), x)
    with pytest.raises(ValueError, match="has to round to a format, and a SparseTensor is no such"):
        compressed(pruned(magnitude(), wanda()), jnp.float32(w), x)
    assert pruned(magnitude(), aqlm(codebooks=1)).seeded
