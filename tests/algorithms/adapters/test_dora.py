"""DoRA against a port of peft, its invariance, its merge, and LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.adapters.dora import dora
from algorithms.formats import integer
from algorithms.tensors import SumTensor
from tests.algorithms.adapters import peft_official as official
from tests.algorithms.adapters.test_lora import moved
from tests.algorithms.quantization.learned_layers import dense, fit, gradients, layer, quantized


def test_takes_the_official_steps(x64):
    """Factors and magnitudes at each of 12 steps; the norm is a constant to gradients."""
    w, x, y = layer()
    y = y + np.random.default_rng(1).normal(size=y.shape)
    made = dora(rank=4, alpha=6.0).make(dense(w), jax.random.key(0))
    ours = made.lora.lora_a, made.lora.lora_b, made.lora.magnitude
    adapter, rate = official.Adapter(*(np.asarray(p[...].T) for p in ours)), 0.05
    np.testing.assert_allclose(adapter.magnitude, np.linalg.norm(w, axis=1), rtol=1e-12)
    for _ in range(12):
        for p, theirs in zip(ours, adapter, strict=True):
            np.testing.assert_allclose(p[...].T, theirs, atol=1e-12)
        upstream = 2 / y.size * (official.forward(x, w, adapter, 1.5) - y)
        adapter = adapter.descended(official.backward(x, w, adapter, 1.5, upstream), rate)
        found = gradients(made, jnp.asarray(x), jnp.asarray(y))
        slopes = found["lora"]["lora_a"], found["lora"]["lora_b"], found["lora"]["magnitude"]
        for p, g in zip(ours, slopes, strict=True):
            p.set_value(p[...] - rate * g[...])
    assert np.abs(adapter.magnitude - np.linalg.norm(w, axis=1)).max() > 1e-3


def test_rows_have_the_magnitudes_whatever_the_factors(x64):
    w, x, _ = layer(1)
    made = moved(dora(rank=4).make(dense(w), jax.random.key(0)))
    np.testing.assert_allclose(
        np.linalg.norm(made.finished(), axis=1), np.linalg.norm(w, axis=1), rtol=1e-12
    )
    np.testing.assert_allclose(x @ made.finished().T, made(jnp.asarray(x)), atol=1e-11)


@pytest.mark.parametrize("format", [integer(group_size=16), formats.nf4(group_size=16),
                                    formats.nvfp4()], ids=str)  # fmt: skip
def test_a_packed_weight_keeps_its_codes(format):
    w, x, y = (jnp.float32(a) for a in layer(2))
    old = quantized(w, format)
    made = dora(rank=4).make(old, jax.random.key(0))
    np.testing.assert_allclose(made(x), old(x), atol=1e-5)
    moved(made)
    found = made.finished()
    assert isinstance(found, SumTensor)
    np.testing.assert_array_equal(found.base.packed, old.tensor.packed)
    np.testing.assert_allclose(found.matmul(x), made(x), atol=2e-5)
    assert fit(made, x, y)[1] < float(jnp.mean((old(x) - y) ** 2))


def test_a_row_of_zeros_stays_finite_and_learns():
    w, x, y = (jnp.float32(a) for a in layer(3))
    made = dora(rank=4).make(dense(w.at[2].set(0)), jax.random.key(0))
    assert not made.finished()[2].any()
    found = gradients(made, x, y)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found))
    assert found["lora"]["lora_b"][...][:, 2].any()


def test_refuses_scales_of_several_rows():
    with pytest.raises(ValueError, match="scales of single rows"):
        dora().make(quantized(layer()[0], formats.fp8(rows=None)), jax.random.key(0))
