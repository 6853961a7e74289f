"""Straight-through training: its gradients, where it begins, and rounding without it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.formats import integer
from algorithms.layerwise import LayerwiseMethod
from algorithms.modules import CompressedLinear
from algorithms.quantization.efficient_qat import e2e_qp
from algorithms.quantization.lsq import lsq, lsq_plus
from algorithms.quantization.rtn import rtn
from algorithms.quantization.ste import ste
from algorithms.tensors import LowRankTensor, QuantizedInput
from tests.algorithms.quantization.learned_layers import dense, fit, gradients, layer, quantized

FORMATS = {
    **{f"{bits} bits, {kind}": integer(bits=bits, group_size=16, symmetric=kind == "symmetric")
       for bits, kind in itertools.product(range(2, 9), ("symmetric", "asymmetric"))},
    "real zero points": integer(bits=3, group_size=16, zero_dtype="float16"),
    "steps in float32": integer(bits=4, group_size=None, scale_dtype="float32"),
    "fp8 rows": formats.fp8(), "fp8 blocks": formats.fp8(rows=4, columns=20),
    "fp8 tensor": formats.fp8(element="e5m2", rows=None),
    **{f"mx {e}": formats.microscaling(element=e) for e in ("e4m3", "e3m2", "e2m1")},
    "nvfp4": formats.nvfp4(), "nf4": formats.nf4(group_size=16),
}  # fmt: skip
METHODS = {
    "ste": ste, "learned": lambda: ste(ranges="learned"), "lsq": lsq, "lsq_plus": lsq_plus,
    "e2e_qp": e2e_qp,
}  # fmt: skip


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_method_begins_at_the_codes_of_a_packed_layer(format):
    """To the last bit; where a range is learned, to that of its scale in float32."""
    w, x, _ = (jnp.float32(a) for a in layer())
    old = quantized(w, format)
    for name, method in METHODS.items():
        if format.rows != 1 and name not in ("ste", "e2e_qp"):
            continue
        made = method().make(old, jax.random.key(0))
        found = made.finished()
        if name == "learned" and old.tensor.scale.dtype == jnp.float32:
            np.testing.assert_array_equal(found.codes(), old.tensor.codes())
            np.testing.assert_allclose(found.scale, old.tensor.scale, rtol=3e-7)
        else:
            same(found.dequantize(), old.tensor.dequantize())
            np.testing.assert_array_equal(found.packed, old.tensor.packed)
        np.testing.assert_allclose(made(x), old(x), atol=2e-5)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.some(8)
def test_a_weight_has_the_gradient_of_what_it_is_rounded_to(format):
    w, x, y = (jnp.float32(a) for a in layer(1))
    made = ste(format=format).make(dense(w), jax.random.key(0))
    rounded = format.quantize(w).dequantize()
    np.testing.assert_array_equal(made.finished().dequantize(), rounded)
    expected = 2 / y.size * (x @ rounded.T - y).T @ x
    np.testing.assert_allclose(gradients(made, x, y)["kernel"][...].T, expected, atol=1e-5)


@pytest.mark.parametrize(("ranges", "rate"), [(None, 3e-3), ("learned", 1e-2)])
def test_training_loses_less_than_rounding(ranges, rate):
    w, x, y = (jnp.float32(a) for a in layer(5, n=200))
    format = integer(bits=2, group_size=16)
    plain = jnp.mean((x @ format.quantize(w).dequantize().T - y) ** 2)
    made = ste(format=format, ranges=ranges).make(dense(w), jax.random.key(0))
    first, last = fit(made, x, y, rate)
    assert first == pytest.approx(float(plain), rel=1e-4)
    assert last < 0.8 * plain
    np.testing.assert_allclose(made.finished().matmul(x), made(x), atol=1e-5)


TOKENS = integer(bits=8, group_size=None, symmetric=True)


@pytest.mark.parametrize("activations", [formats.nvfp4(), TOKENS], ids=str)
def test_inputs_are_rounded_with_the_gradient_of_the_identity(activations):
    w, x, _ = (jnp.float32(a) for a in layer(3))
    method = ste(format=formats.nvfp4(), activations=activations)
    made = method.make(dense(w), jax.random.key(0))
    np.testing.assert_array_equal(made.finished().matmul(x), made(x))
    assert (made.finished().rounded(x) != x).any()
    slope = jax.grad(lambda x: made(x).sum())(x)
    whole = jnp.broadcast_to(made.finished().dequantize().sum(0), x.shape)
    np.testing.assert_allclose(slope, whole, atol=1e-5)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_layer_that_rounds_its_input_goes_on_so(dynamic):
    w, x, _ = (jnp.float32(a) for a in layer(4))
    format = integer(bits=8, group_size=None, scale_dtype="float32")
    format = format if dynamic else formats.fp8(rows=None)
    method: LayerwiseMethod = quantized_inputs(format=format, dynamic=dynamic)(
        rtn(format=integer(group_size=16))
    )
    stats = None if dynamic else method.observe(method.init(x.shape[1]), x)
    old = CompressedLinear(method.compress(w, stats))
    for way in METHODS.values():
        made = way().make(old, jax.random.key(0))
        assert isinstance(made.finished(), QuantizedInput)
        np.testing.assert_allclose(made(x), old(x), atol=2e-5)
        np.testing.assert_array_equal(made.finished().rounded(x), old.tensor.rounded(x))


def test_refuses_what_it_cannot_do():
    w, *_ = layer()
    key, packed = jax.random.key(0), quantized(w, integer(bits=3, group_size=16))
    with pytest.raises(ValueError, match="is not the one that a layer is quantized to"):
        ste(format=integer(bits=4, group_size=16)).make(packed, key)
    ste(format=integer(bits=3, group_size=16)).make(packed, key)  # the same in other words
    with pytest.raises(ValueError, match="this one is dense: choose a format"):
        ste().make(dense(w), key)
    with pytest.raises(ValueError, match="ranges='kept' needs a quantized layer"):
        ste(format=integer(group_size=16), ranges="kept").make(dense(w), key)
    with pytest.raises(ValueError, match="ranges='other' must be"):
        ste(ranges="other")
    with pytest.raises(ValueError, match="search=diagonal needs activations"):
        ste(format=integer(group_size=16, search="diagonal")).make(dense(w), key)
    low = CompressedLinear(LowRankTensor(jnp.ones((6, 2)), jnp.ones((2, 32))))
    with pytest.raises(ValueError, match="A LowRankTensor has no grid"):
        ste().make(low, key)
    with pytest.raises(ValueError, match="group_size=64 must divide"):
        ste(format=integer(group_size=64)).make(dense(w), key)
