import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import formats, surgery
from algorithms.elements import Integer
from algorithms.modules import CompressedLinear
from tests.algorithms.integers import rtn


def tensor(o=6, i=24, bits=3, symmetric=False, group_size=8, scale_dtype="float16"):
    w = jax.random.normal(jax.random.key(0), (o, i))
    grid = dict(bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    return rtn(**grid).compress(w, None), w


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.some(5)
def test_dequantize_is_scale_times_code_minus_zero(bits, symmetric):
    q, _ = tensor(bits=bits, symmetric=symmetric)
    codes = np.asarray(q.codes(), np.float64)
    zero = np.repeat(np.asarray(q.zero_point(), np.float64), 8, 1)
    expected = (codes - zero) * np.repeat(np.asarray(q.scale, np.float64), 8, 1)
    np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-6)
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_storage_counts_codes_scales_and_zero_points():
    q, _ = tensor(o=6, i=24, bits=3, group_size=8)
    assert q.storage_bits() == 6 * (24 * 3 + 3 * 16 + 3 * 8)
    q, _ = tensor(o=6, i=24, bits=3, group_size=8, symmetric=True)
    assert q.storage_bits() == 6 * (24 * 3 + 3 * 16)
    q, _ = tensor(o=2, i=10, bits=3, group_size=None, symmetric=True, scale_dtype="float32")
    assert q.storage_bits() == 2 * (16 * 3 + 32)  # 10 columns are padded to 16


def test_split_gives_consecutive_rows():
    q, _ = tensor(o=6)
    pieces = q.split([1, 3, 2])
    assert [piece.shape for piece in pieces] == [(1, 24), (3, 24), (2, 24)]
    np.testing.assert_array_equal(jnp.concatenate([p.codes() for p in pieces]), q.codes())


def test_it_is_a_pytree_that_jit_and_vmap_take():
    q, _ = tensor()
    np.testing.assert_array_equal(jax.jit(lambda t: t.dequantize())(q), q.dequantize())
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    np.testing.assert_array_equal(jax.vmap(lambda t: t.dequantize())(stacked)[1], q.dequantize())


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"element": Integer(bits=4)}, "does not hold 6 rows of 24 codes of 4 bits"),
        ({"columns": 80}, "does not hold 6 rows of 80 codes of 3 bits"),
        ({"scale": jnp.ones((6, 5)), "zero": None}, "scale.shape=.6, 5. is not .6, 3."),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, sentence):
    q, _ = tensor()
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(q, **change).validate()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantized_layer_computes_what_its_dense_weight_does(bias, symmetric):
    class Holder(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(24, 6, use_bias=bias, rngs=nnx.Rngs(0))])

    holder = Holder()
    if bias:
        holder.layers[0].bias.set_value(jnp.arange(6.0))
    q, _ = tensor(symmetric=symmetric)
    surgery.set_weight(holder.layers[0], q.dequantize())
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    expected = holder.layers[0](x)
    surgery.compress_linear(holder, "layers.0", q)
    assert isinstance(holder.layers[0], CompressedLinear)
    np.testing.assert_allclose(holder.layers[0](x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(holder.layers[0].tensor.codes(), q.codes())
    floats = [v for v in jax.tree.leaves(nnx.state(holder)) if v.dtype == jnp.float32]
    assert all(v.size < 24 * 6 for v in floats)  # no dense weight is kept


def test_surgery_refuses_what_is_not_there_or_does_not_fit():
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="w.shape=.4, 3. does not fit a linear layer of .3, 4."):
        surgery.set_weight(linear, jnp.ones((4, 3)))
    with pytest.raises(ValueError, match="no module at path='gate'"):
        surgery.find(linear, "gate")
    with pytest.raises(ValueError, match="holds a RMSNorm, no linear layer"):
        surgery.linear_at(nnx.List([nnx.RMSNorm(3, rngs=nnx.Rngs(0))]), "0")


def test_weights_are_out_by_in():
    linear = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    w = jax.random.normal(jax.random.key(0), (3, 4))
    surgery.set_weight(linear, w)
    np.testing.assert_array_equal(surgery.get_weight(linear), w)
    x = jnp.ones((1, 4))
    np.testing.assert_allclose(linear(x), x @ w.T, rtol=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        formats.nvfp4(),
        formats.microscaling(),
        formats.nf4(),
        formats.integer(bits=3, group_size=32),
        formats.integer(bits=4, group_size=32, scale_dtype="float8_e4m3fn"),
    ],
    ids=["nvfp4", "mxfp4", "nf4", "3 bits", "scales in fp8"],
)
def test_a_product_is_of_the_packed_weight(form, monkeypatch):
    """With the operation of kernels/, not of a dense weight made first."""
    w, x = (jax.random.normal(jax.random.key(n), (n, 64)) for n in (24, 5))
    tensor = form.quantize(w)
    expected = jax.jit(lambda t, x: x @ t.dequantize(x.dtype).T)(tensor, x)
    monkeypatch.setattr(type(tensor), "dequantize", None)
    found = jax.jit(lambda t, x: t.matmul(x))(tensor, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
