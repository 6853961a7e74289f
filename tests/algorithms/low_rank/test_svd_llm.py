"""SVD-LLM against a port of the official code, its theory, and other truncations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import hessian
from algorithms.formats import integer
from algorithms.low_rank.asvd import asvd
from algorithms.low_rank.ranks import Ratio
from algorithms.low_rank.svd import svd
from algorithms.low_rank.svd_llm import fitted, require_factors, svd_llm, truncation_losses
from algorithms.quantization.gptq import gptq
from algorithms.quantization.rtn import rtn
from algorithms.quantization.smoothquant import smoothquant
from algorithms.tensors import LowRankTensor, QuantizedTensor
from tests.algorithms.low_rank import factor_official as official
from tests.algorithms.low_rank.layers import compress, layer, output_norm
from tests.algorithms.quantization.test_gptq import equations

SHAPES = [(12, 20), (30, 20)]  # through W G Wᵀ, and through a root of G


def exact(method, w, x):
    """In float64, with factors kept so."""
    stats = hessian.HessianStats(jnp.asarray(x.T @ x))
    tensor = jax.jit(method.compress)(jnp.asarray(w), stats)
    tensor.validate()
    return tensor


@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_is_the_official_code(x64, shape):
    w, x = layer(0, *shape)
    u, v = official.svd_llm(w, x, 0.6)
    tensor = exact(svd_llm(ratio=0.6, update=False, dtype="float64"), w, x)
    assert tensor.rank == v.shape[0] == official.rank(shape, 0.6)
    np.testing.assert_allclose(tensor.dequantize(), u @ v, atol=1e-8)


@pytest.mark.parametrize("whitening", [False, True])
def test_the_update_is_the_official_code(x64, whitening):
    w, x = layer(1)
    s = official.whitening_matrix(x) if whitening else None
    u, v = official.svd_llm_updated(w, x, 0.6, s)
    tensor = exact(svd_llm(ratio=0.6, whitening=whitening, dtype="float64"), w, x)
    np.testing.assert_allclose(tensor.dequantize(), u @ v, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_lost_is_the_discarded_energy_of_every_rank(x64, shape):
    w, x = layer(2, *shape)
    losses = np.asarray(truncation_losses(jnp.asarray(w), jnp.asarray(x.T @ x)))
    assert losses.shape == (min(shape) + 1,) and losses[-1] == 0
    np.testing.assert_allclose(losses[0], output_norm(w, x), rtol=1e-9)
    s = np.linalg.svd(w @ np.linalg.cholesky(x.T @ x), compute_uv=False)
    np.testing.assert_allclose(losses[:-1], np.cumsum(s[::-1] ** 2)[::-1], rtol=1e-7)
    tensor = exact(svd_llm(ratio=0.6, dtype="float64"), w, x)
    left = output_norm(w - tensor.dequantize(), x)
    np.testing.assert_allclose(left, losses[tensor.rank], rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.some(1)
def test_no_other_matrix_of_its_rank_loses_less(shape):
    """And a fit to activations never loses more than the truncation that it begins with."""
    w, x = layer(3, *shape)

    def lost(method):
        tensor, _ = compress(method, w, x)
        assert tensor.rank == official.rank(shape, 0.5)
        return output_norm(w - tensor.dequantize(), x)

    best = lost(svd_llm(ratio=0.5))
    plain = lost(svd(ratio=0.5))
    refitted = lost(svd_llm(ratio=0.5, whitening=False))
    assert best < refitted < plain and best < lost(asvd(ratio=0.5))
    root, rng = np.linalg.cholesky(x.T @ x), np.random.default_rng(0)
    for _ in range(5):  # the best in a row space at random, in the same norm
        inputs = np.linalg.qr(root.T @ rng.normal(size=(20, official.rank(shape, 0.5))))[0]
        assert best < np.sum((w @ root - w @ root @ inputs @ inputs.T) ** 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.some(1)
def test_the_whole_rank_gives_the_weight_back(shape, monkeypatch):
    w, x = layer(4, *shape)
    monkeypatch.setattr(Ratio, "rank", lambda self, shape: min(shape))
    tensor, stats = compress(svd_llm(), w, x)
    np.testing.assert_allclose(tensor.dequantize(), w, atol=6e-3)
    error = svd_llm().error(jnp.asarray(w, jnp.float32), tensor.dequantize(), stats)
    assert error < 1e-5


def test_the_update_makes_up_for_a_rounded_factor():
    """It is fitted to B as it is stored; without rounding it has nothing to do."""
    w, x = layer(5, o=32, i=64, n=300)
    factors = rtn(format=integer(bits=2, group_size=None))

    def lost(update, factors):
        tensor, _ = compress(svd_llm(ratio=0.6, update=update, factors=factors), w, x)
        return output_norm(w - tensor.dequantize(), x)

    assert lost(True, factors) < 0.8 * lost(False, factors)
    np.testing.assert_allclose(lost(True, None), lost(False, None), rtol=1e-2)


def test_a_fit_to_any_factor_is_least_squares(x64):
    rng = np.random.default_rng(0)
    w, x = layer(6)
    a, b = rng.normal(size=(12, 4)), rng.normal(size=(4, 20))
    expected = np.linalg.lstsq(x @ b.T, x @ w.T, rcond=None)[0].T
    found = fitted(*map(jnp.asarray, (w, a, b, x.T @ x)))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", [rtn, gptq])
def test_factors_are_layers_of_their_own(method):
    """Codes of both and nothing else; by GPTQ, each for what it multiplies, better than rounded."""
    w, x = layer(7, o=96, i=128, n=600)
    factors = method(format=integer(bits=4, group_size=16))
    tensor, stats = compress(svd_llm(ratio=0.9, rank_multiple=16, factors=factors), w, x)
    tensor.validate()
    assert isinstance(tensor.a, QuantizedTensor) and isinstance(tensor.b, QuantizedTensor)
    assert tensor.rank == 48 and tensor.shape == (96, 128)
    # Of 16 codes of 4 bits: a scale in 16, a zero point in 8.
    assert tensor.storage_bits() == 48 * (96 + 128) * (4 + 24 / 16)
    factors = rtn(format=integer(group_size=16))
    rounded, _ = compress(svd_llm(ratio=0.9, rank_multiple=16, update=False, factors=factors), w, x)
    assert output_norm(w - tensor.dequantize(), x) < output_norm(w - rounded.dequantize(), x)


def test_a_seeded_method_of_factors_gets_its_key():
    from algorithms.quantization.stochastic_rounding import stochastic_rounding

    w, x = layer(8)
    factors = stochastic_rounding(format=integer(group_size=None))
    method = svd_llm(factors=factors)
    assert method.seeded and not svd_llm().seeded
    stats = hessian.HessianStats(jnp.asarray(x.T @ x, jnp.float32))
    w = jnp.asarray(w, jnp.float32)
    first, again, other = (
        method.compress(w, stats, jax.random.key(seed)).dequantize() for seed in (0, 0, 1)
    )
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("whitening", [True, False])
@pytest.mark.some(2)
def test_finite_on_dead_inputs_few_tokens_zero_rows_and_zero_layers(shape, whitening):
    """Where the official code raises eigenvalues, or inverts."""
    w, x = layer(9, *shape)
    x[:, 5], w[3] = 0, 0
    method = svd_llm(whitening=whitening)
    for inputs in (x, x[:3], 0 * x):
        dense = compress(method, w, inputs)[0].dequantize()
        assert jnp.isfinite(dense).all() and not dense[3].any()
    few, _ = compress(svd_llm(), w, x[:3])
    assert output_norm(w - few.dequantize(), x[:3]) < 1e-4 * output_norm(w, x[:3])
    tensor, stats = compress(method, 0 * w, x)
    assert not tensor.dequantize().any()
    assert method.error(jnp.zeros(shape), tensor.dequantize(), stats) == 0


def test_layers_are_not_stacked_and_share_the_hessian():
    method = svd_llm()
    assert not method.stacked and method.observe is hessian.observe
    assert isinstance(compress(method, *layer(10))[0], LowRankTensor)


@pytest.mark.parametrize("o", [10, 200])
def test_the_graph_does_not_grow_with_width(o):
    def size(i):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((o, i), (i, i))]
        run = jax.make_jaxpr(lambda w, g: svd_llm().compress(w, hessian.HessianStats(g)))
        return equations(run(*shapes).jaxpr)

    assert size(100) == size(20) < 200


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"ratio": 0.0}, "ratio=0.0 must be between 0 and 1"),
        ({"ratio": 1.0}, "ratio=1.0 must be between 0 and 1"),
        ({"rank_multiple": 0}, "rank_multiple=0 must be positive"),
        ({"whitening": False, "update": False}, "whitening=False with update=False.*algorithm=svd"),
        ({"factors": asvd()}, "factors are compressed by a method of single layers"),
    ],
)
def test_refuses_settings_that_mean_nothing(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        svd_llm(**settings)
    with pytest.raises(ValueError, match="choose rtn, gptq or hqq"):
        require_factors(smoothquant())


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"ratio": 0.1}, r"ratio=0.1 leaves no rank of a weight \[12, 20\]"),
        ({"rank_multiple": 16}, "multiple of rank_multiple=16"),
        (
            {"factors": rtn(format=integer(group_size=5))},
            "group_size=5 must divide .*factor of rank 6, which rank_multiple makes a multiple",
        ),
    ],
)
def test_refuses_what_a_weight_has_no_room_for(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        compress(svd_llm(**settings), *layer(11))
