"""LoRA and QLoRA against a port of peft, the exact merge, and the packed weight they are beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import formats
from algorithms.adapters.lora import lora, scaling
from algorithms.adapters.qlora import qlora
from algorithms.formats import integer
from algorithms.tensors import QuantizedTensor, SumTensor
from tests.algorithms.adapters import peft_official as official
from tests.algorithms.quantization.learned_layers import (
    dense,
    fit,
    gradients,
    layer,
    quantized,
)


def moved(made, seed=0):
    """The same layer with factors that are not zero."""
    rng = np.random.default_rng(seed)
    b = made.lora.lora_b
    b.set_value(jnp.asarray(rng.normal(size=b[...].shape), b[...].dtype))
    return made


def test_takes_the_official_steps(x64):
    """Both factors at each of 12 steps."""
    w, x, y = layer()
    y = y + np.random.default_rng(1).normal(size=y.shape)
    made = lora(rank=4, alpha=6.0).make(dense(w), jax.random.key(0))
    a, b = made.lora.lora_a, made.lora.lora_b
    adapter, rate = official.Adapter(np.asarray(a[...].T), np.asarray(b[...].T)), 0.05
    for _ in range(12):
        np.testing.assert_allclose(a[...].T, adapter.lora_A, atol=1e-12)
        np.testing.assert_allclose(b[...].T, adapter.lora_B, atol=1e-12)
        upstream = 2 / y.size * (official.forward(x, w, adapter, 1.5) - y)
        adapter = adapter.descended(official.backward(x, w, adapter, 1.5, upstream), rate)
        found = gradients(made, jnp.asarray(x), jnp.asarray(y))
        for p, g in ((a, found["lora"]["lora_a"]), (b, found["lora"]["lora_b"])):
            p.set_value(p[...] - rate * g[...])
    assert np.abs(adapter.lora_B).max() > 0.01


def test_begins_as_the_layer_and_merges_into_it(x64):
    w, x, _ = layer()
    made = lora(rank=4, rank_stabilized=True).make(dense(w), jax.random.key(0))
    np.testing.assert_allclose(made(jnp.asarray(x)), x @ w.T, atol=1e-12)
    moved(made)
    product = np.asarray(made.lora.lora_a[...] @ made.lora.lora_b[...]).T
    np.testing.assert_allclose(made.finished(), w + 8 * product, atol=1e-12)
    np.testing.assert_allclose(x @ made.finished().T, made(jnp.asarray(x)), atol=1e-11)


@pytest.mark.parametrize("format", [integer(group_size=16), formats.nf4(group_size=16),
                                    formats.nvfp4()], ids=str)  # fmt: skip
def test_a_packed_weight_stays_and_nothing_is_lost(format):
    w, x, y = (jnp.float32(a) for a in layer(1))
    for old in (dense(w), quantized(w, format)):
        made = moved(qlora(rank=4, format=format).make(old, jax.random.key(0)))
        found = made.finished()
        assert isinstance(found, SumTensor) and isinstance(found.base, QuantizedTensor)
        np.testing.assert_array_equal(found.matmul(x), made(x))
        expected = format.quantize(w) if isinstance(old, nnx.Linear) else old.tensor
        np.testing.assert_array_equal(found.base.packed, expected.packed)
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(made(x))))(x)  # noqa: B023
        through = jax.grad(lambda x: jnp.sum(jnp.sin(x @ found.dequantize().T)))(x)  # noqa: B023
        np.testing.assert_allclose(slope, through, atol=1e-4)
    assert fit(made, x, y)[1] < float(jnp.mean((old(x) - y) ** 2))


def test_gradients_are_those_of_finite_differences(x64):
    w, x, y = (jnp.asarray(a) for a in layer(2))
    made = moved(lora(rank=3).make(dense(w), jax.random.key(0)))
    found, e = gradients(made, x, y)["lora"], 1e-6
    for name in ("lora_a", "lora_b"):
        p = getattr(made.lora, name)
        start, ends = p[...], []
        for d in (e, -e):
            p.set_value(start.at[1, 2].add(d))
            ends.append(jnp.mean((made(x) - y) ** 2))
        p.set_value(start)
        np.testing.assert_allclose(found[name][...][1, 2], (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_the_base_is_not_among_what_is_learned():
    w, *_ = layer()
    for old in (dense(np.float32(w)), quantized(w, integer(group_size=16))):
        made = lora(rank=2).make(old, jax.random.key(0))
        names = {".".join(path) for path, _ in nnx.to_flat_state(nnx.state(made, nnx.Param))}
        assert names == {"lora.lora_a", "lora.lora_b"}
        assert isinstance(made.lora.lora_a, nnx.LoRAParam)


def test_the_scale_of_the_product():
    assert scaling(16, 32.0) == 2
    assert scaling(16, 32.0, True) == 8
    with pytest.raises(ValueError, match="rank=0 must be positive"):
        lora(rank=0)
