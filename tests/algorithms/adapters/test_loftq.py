"""LoftQ against a port of the official code, and QLoRA, which begins without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.adapters.loftq import alternate, best, loftq
from algorithms.adapters.qlora import qlora
from algorithms.formats import integer
from tests.algorithms.adapters import loftq_official as official
from tests.algorithms.quantization.learned_layers import dense, layer, quantized


@pytest.mark.parametrize("rounds", [1, 5])
def test_begins_where_the_official_code_does(x64, rounds):
    """The packed weight, the product, and factors up to the sign of each pair."""
    w, *_ = layer(o=12, i=32)
    format = formats.nf4(group_size=16, scale_dtype="float32")
    q, low = alternate(jnp.asarray(w), 3, format, rounds)
    dense, left, right = official.loftq(w, 3, 16, rounds)
    np.testing.assert_allclose(q.dequantize(jnp.float64), dense, atol=1e-6)  # levels in float32
    np.testing.assert_allclose(low.a @ low.b, left @ right, atol=1e-5)
    np.testing.assert_allclose(np.abs(low.a), np.abs(left), atol=1e-5)
    np.testing.assert_allclose(np.abs(low.b), np.abs(right), atol=1e-5)


@pytest.mark.parametrize("format", [formats.nf4(group_size=16), integer(bits=2, group_size=16)],
                         ids=str)  # fmt: skip
def test_is_nearer_to_the_dense_weight_than_qlora(format):
    w = jnp.float32(layer(1)[0])
    near = [
        float(jnp.linalg.norm(method.make(dense(w), jax.random.key(0)).finished().dequantize() - w))
        for method in (loftq(rank=3, alpha=5.0, format=format), qlora(rank=3, format=format))
    ]
    assert near[0] < 0.9 * near[1]


def test_each_correction_is_the_best_of_its_rank(x64):
    """Eckart and Young: what is left are the other singular values."""
    m = jnp.asarray(layer(2)[0])
    found = best(m, 2)
    values = np.linalg.svd(m, compute_uv=False)
    left = np.linalg.norm(m - found.a @ found.b)
    np.testing.assert_allclose(left, np.linalg.norm(values[2:]), rtol=1e-6)
    whole = best(m, 9)  # beyond its rank, 6
    assert whole.rank == 9
    np.testing.assert_allclose(whole.a @ whole.b, m, atol=1e-9)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="rounds=0 must be positive"):
        loftq(rounds=0)
    with pytest.raises(ValueError, match="begin with a dense model, or choose qlora"):
        loftq().make(quantized(layer()[0], integer(group_size=16)), jax.random.key(0))
