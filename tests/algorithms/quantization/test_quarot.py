"""QuaRot's pieces on arrays; on whole models: tests/experiments/checkpoints/test_rotated.py.

The deviations are those of papers/quarot.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.layerwise import LayerwiseMethod
from algorithms.quantization import quarot
from algorithms.tensors import DenseTensor, QuantizedInput
from algorithms.tensors.rotated import RotatedTensor
from kernels.hadamard import hadamard_matrix
from tests.algorithms.integers import gptq, rtn
from tests.algorithms.quantization import quarot_official as official

DENSE = LayerwiseMethod(None, None, lambda w, stats: DenseTensor(w))
INT4_TOKEN = formats.integer(bits=4, group_size=None, symmetric=True, scale_dtype="float32")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def rms(x):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True))


@pytest.mark.parametrize("kind", quarot.KINDS)
def test_the_rotation_is_orthogonal_and_a_function_of_its_key(kind):
    r = quarot.residual_rotation(jax.random.key(0), 24, kind)
    np.testing.assert_allclose(r.T @ r, np.eye(24), atol=1e-5)
    np.testing.assert_array_equal(r, quarot.residual_rotation(jax.random.key(0), 24, kind))
    other = quarot.residual_rotation(jax.random.key(1), 24, kind)
    assert jnp.abs(r - other).max() > 0.1


def test_the_hadamard_rotation_is_the_official_one():
    """matmul_had of a diagonal of random signs; every entry is ±1/√n."""
    r = np.asarray(quarot.residual_rotation(jax.random.key(0), 32), np.float64)
    signs = np.sign(r[:, 0])  # H's first column is all ones
    np.testing.assert_allclose(r, official.matmul_had(np.diag(signs)), atol=1e-6)
    assert 0 < (signs > 0).sum() < 32


@pytest.mark.parametrize("kind", quarot.KINDS)
def test_a_turned_layer_computes_what_it_did(kind):
    """Between norm and residual: rms(x) γ Wᵀ, and W back into the stream."""
    x, gamma = normal(0, 5, 24), 1 + normal(1, 24) / 4
    reader, writer = normal(2, 16, 24), normal(3, 24, 16)
    r = quarot.residual_rotation(jax.random.key(4), 24, kind)
    expected = (rms(x) * gamma[None]) @ reader.T
    found = rms(x @ r) @ quarot.read_rotated(reader, gamma, r).T
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    turned = found @ quarot.write_rotated(writer, r).T
    np.testing.assert_allclose(turned, expected @ writer.T @ r, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("head_size", [8, 12])
def test_turned_heads_meet_what_reads_them(head_size):
    """Two value heads serve six query heads: any mixture over tokens, by head, stays as it was."""
    x, v, b, o = normal(0, 5, 9), normal(1, 2 * head_size, 9), normal(2, 2 * head_size), None
    o = normal(3, 7, 6 * head_size)

    def attend(v, b, o):
        values = (x @ v.T + b[None]).reshape(5, 2, head_size)
        mixed = jnp.einsum("ts,skh->tkh", jax.nn.softmax(normal(4, 5, 5)), values)
        return jnp.repeat(mixed, 3, 1).reshape(5, -1) @ o.T

    turned = (
        quarot.rotate_values(v, head_size),
        quarot.rotate_values(b, head_size),
        quarot.rotate_heads(o, head_size),
    )
    np.testing.assert_allclose(attend(*turned), attend(v, b, o), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [32, 48])
def test_an_online_rotation_is_the_official_one(width):
    w = normal(0, 6, width)
    tensor = quarot.rotated_inputs()(DENSE).compress(w, None)
    had_k = None if width == 32 else hadamard_matrix(12).T  # ours multiplies rows from the right
    expected = official.matmul_had(np.asarray(w, np.float64), had_k)
    np.testing.assert_allclose(tensor.weight.dequantize(), expected, atol=1e-5)


def test_an_online_rotation_alone_changes_nothing():
    w, x = normal(0, 6, 48), normal(1, 5, 48)
    tensor = quarot.rotated_inputs()(DENSE).compress(w, None)
    assert isinstance(tensor, RotatedTensor) and not tensor.online
    tensor.validate()
    np.testing.assert_allclose(tensor.dequantize(), w, atol=1e-5)
    np.testing.assert_allclose(tensor.matmul(x), x @ w.T, rtol=1e-4, atol=1e-4)


def test_the_method_sees_turned_activations():
    """Statistics are those of H x, and the error is the same in both coordinates."""
    w, x = normal(0, 6, 48), normal(1, 96, 48) * jnp.exp(normal(2, 48))[None]
    plain, turned = (
        gptq(bits=3, group_size=None),
        quarot.rotated_inputs()(gptq(bits=3, group_size=None)),
    )
    stats = turned.observe(turned.init(48), x)
    expected = plain.observe(plain.init(48), x)
    h = hadamard_matrix(48) / np.sqrt(48)
    np.testing.assert_allclose(stats.gram, h.T @ expected.gram @ h, rtol=1e-3, atol=1e-2)
    rounded = turned.compress(w, stats).dequantize()
    errors = turned.error(w, rounded, stats), plain.error(w, rounded, expected)
    np.testing.assert_allclose(*errors, rtol=1e-3)
    assert set(turned.notes(stats)) == set(plain.notes(expected))


def outlier_layer():
    """W, and activations whose fourth channel is ten times the others and counts as much."""
    scale = jnp.ones(48).at[3].set(10.0)[None]
    return normal(0, 16, 48) / scale, normal(1, 64, 48) * scale


def w4a4():
    return quantized_inputs(format=INT4_TOKEN)(rtn(bits=4, group_size=None, symmetric=True))


def test_w4a4_with_an_outlier_channel_is_nearer_when_turned():
    w, x = outlier_layer()
    exact = x @ w.T

    def error(method):
        y = jax.jit(lambda t, x: t.matmul(x))(method.compress(w, None), x)
        return float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))

    assert error(quarot.rotated_inputs()(w4a4())) < 0.5 * error(w4a4())


def test_around_quantized_inputs_it_stays_online_when_unpacked():
    w, x = outlier_layer()
    tensor = quarot.rotated_inputs()(w4a4()).compress(w, None)
    assert tensor.online and isinstance(tensor.weight, QuantizedInput)
    unpacked = tensor.unpacked(jnp.float32)
    assert isinstance(unpacked, RotatedTensor) and unpacked.online
    assert isinstance(unpacked.weight.weight, DenseTensor)
    np.testing.assert_allclose(unpacked.matmul(x), tensor.matmul(x), rtol=1e-3, atol=1e-2)
    rest = tensor.split([4, 12])
    assert [piece.shape for piece in rest] == [(4, 48), (12, 48)] and rest[1].online


def test_without_quantized_inputs_it_unpacks_to_the_dense_weight():
    tensor = quarot.rotated_inputs()(rtn(bits=4)).compress(normal(0, 6, 64), None)
    unpacked = tensor.unpacked(jnp.float32)
    assert isinstance(unpacked, DenseTensor)
    np.testing.assert_allclose(unpacked.weight, tensor.dequantize(), atol=1e-6)


@pytest.mark.parametrize("make", [rtn, gptq])
def test_zeros_and_dead_inputs_stay_finite(make):
    method = quarot.rotated_inputs()(make(bits=4, group_size=None))
    stats = method.init(48) if method.init else None
    dense = jax.jit(method.compress)(jnp.zeros((6, 48)), stats).dequantize()
    assert not dense.any() and method.error(jnp.zeros((6, 48)), dense, stats) == 0
    w = normal(0, 6, 48).at[2].set(0)
    found = jax.jit(method.compress)(w, stats).dequantize()
    assert jnp.isfinite(found).all() and not found[2].any()


def test_bad_settings_are_sentences():
    with pytest.raises(ValueError, match="kind='hadamrd' must be hadamard or random"):
        quarot.residual_rotation(jax.random.key(0), 24, "hadamrd")
    with pytest.raises(ValueError, match="n=30 has no Hadamard matrix here"):
        quarot.residual_rotation(jax.random.key(0), 30)
    with pytest.raises(ValueError, match="n=30 has no Hadamard matrix here"):
        quarot.rotated_inputs()(DENSE).compress(normal(0, 6, 30), None)


def test_the_graph_does_not_grow_with_width():
    def size(n):
        method = quarot.rotated_inputs()(rtn(bits=4, group_size=None))
        w = jax.ShapeDtypeStruct((6, n), jnp.float32)
        return len(jax.make_jaxpr(functools.partial(method.compress, stats=None))(w).jaxpr.eqns)

    assert size(48) == size(192)
