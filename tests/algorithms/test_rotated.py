import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import incoherence
from algorithms.tensors.rotated import RotatedTensor
from kernels.hadamard import hadamard_matrix
from tests.algorithms.integers import rtn

LAYOUTS = {  # of 24 outputs and 48 inputs: row_block, column_block
    "inputs alone": (None, None),
    "all outputs": (24, None),
    "blocks of outputs": (4, None),
    "blocks of both": (12, 16),
}


@functools.cache
def make(layout="blocks of outputs"):
    """A rotated layer of 24 outputs, rounded; the weight, and the signs it was rotated by."""
    row_block, column_block = LAYOUTS[layout]
    method = rtn(bits=8, group_size=None, scale_dtype="float32")

    @jax.jit
    def compress(key):
        keys = jax.random.split(key, 3)
        w = jax.random.normal(keys[0], (24, 48))
        su, sv = incoherence.signs(keys[1], 48), incoherence.signs(keys[2], 24)
        sv = None if row_block is None else sv
        rotated = incoherence.rotate_weight(w, su, sv, row_block, column_block)
        inner = method.compress(rotated, None)
        return RotatedTensor.from_signs(inner, su, sv, row_block, column_block), w, su, sv

    return compress(jax.random.key(0))


@jax.jit
def dense(tensor):
    return tensor.dequantize()


@jax.jit
def product(tensor, x):
    return tensor.matmul(x)


def rotation(signs, block):
    """U with x Uᵀ = rotate(x, signs, block), in float64."""
    block = block or len(signs)
    h = np.kron(np.eye(len(signs) // block), hadamard_matrix(block)) / math.sqrt(block)
    return (np.diag(np.asarray(signs, np.float64)) @ h).T


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantize_is_vt_w_u(layout):
    tensor, w, su, sv = make(layout)
    tensor.validate()
    row_block, column_block = LAYOUTS[layout]
    v = np.eye(24) if sv is None else rotation(sv, row_block)
    inner = np.asarray(dense(tensor.weight), np.float64)
    expected = v.T @ inner @ rotation(su, column_block)
    found = dense(tensor)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert tensor.shape == w.shape == found.shape and found.dtype == jnp.float32
    np.testing.assert_allclose(found, w, atol=0.05)  # 8 bits: it is the weight


def test_dequantize_casts_at_the_end():
    tensor, *_ = make()
    low = tensor.dequantize(jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), dense(tensor), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matmul_is_x_wt(layout):
    tensor, *_ = make(layout)
    x = jax.random.normal(jax.random.key(1), (2, 5, 48))
    expected = np.asarray(x, np.float64) @ np.asarray(dense(tensor), np.float64).T
    np.testing.assert_allclose(product(tensor, x), expected, rtol=1e-5, atol=1e-5)


def test_matmul_keeps_the_dtype_of_x():
    tensor, *_ = make("blocks of both")
    x = jax.random.normal(jax.random.key(1), (5, 48))
    low, full = product(tensor, x.astype(jnp.bfloat16)), product(tensor, x)
    assert low.dtype == jnp.bfloat16
    assert jnp.linalg.norm(low.astype(jnp.float32) - full) < 0.02 * jnp.linalg.norm(full)


def test_matmul_multiplies_by_the_inner_tensor_itself():
    """The rotated weight's own product is taken, and no dense W is made."""
    tensor, *_ = make()

    class Counting(type(tensor.weight)):  # type: ignore[misc]
        calls: list = []

        def matmul(self, x):
            self.calls.append(x.shape)
            return super().matmul(x)

        def dequantize(self, dtype=None):
            assert dtype is not None, "the dense form was asked for"
            return super().dequantize(dtype)

    fields = {f.name: getattr(tensor.weight, f.name) for f in dataclasses.fields(tensor.weight)}
    counted = dataclasses.replace(tensor, weight=Counting(**fields))
    counted.matmul(jnp.ones((3, 48)))
    assert Counting.calls == [(3, 48)]


@pytest.mark.parametrize(
    "layout, rows",
    [
        ("inputs alone", [1, 20, 3]),
        ("all outputs", [24]),
        ("blocks of outputs", [8, 4, 12]),
        ("blocks of both", [12, 12]),
    ],
)
def test_split_gives_consecutive_rows_complete_in_themselves(layout, rows):
    tensor, *_ = make(layout)
    pieces = tensor.split(rows)
    assert [piece.shape for piece in pieces] == [(n, 48) for n in rows]
    for piece in pieces:
        piece.validate()
    found = np.concatenate([dense(piece) for piece in pieces])
    np.testing.assert_allclose(found, dense(tensor), rtol=1e-6, atol=1e-6)


def test_split_refuses_to_cut_a_block():
    tensor, *_ = make("blocks of both")
    with pytest.raises(ValueError, match=r"rows=\[8, 16\] must be multiples of row_block=12"):
        tensor.split([8, 16])
    with pytest.raises(ValueError, match="compress with row_block=8 or without"):
        tensor.split([8, 16])


@pytest.mark.parametrize(
    "layout, signs",
    [
        ("inputs alone", 48),
        ("all outputs", 48 + 24),
        ("blocks of outputs", 48 + 6 * 8),  # a byte for each block of 4
        ("blocks of both", 48 + 2 * 16),
    ],
)
def test_storage_counts_signs_as_bits(layout, signs):
    tensor, *_ = make(layout)
    assert tensor.storage_bits() == tensor.weight.storage_bits() + signs


def test_signs_come_back_as_they_went_in():
    for layout in LAYOUTS:
        tensor, _, su, sv = make(layout)
        np.testing.assert_array_equal(tensor.input_signs(), su)
        if sv is None:
            assert tensor.output_signs() is None
        else:
            np.testing.assert_array_equal(tensor.output_signs(), sv)


def test_without_a_row_block_all_outputs_are_one():
    tensor, _, su, sv = make("all outputs")
    again = RotatedTensor.from_signs(tensor.weight, su, sv)
    assert again.row_block == 24
    np.testing.assert_array_equal(dense(again), dense(tensor))


@pytest.mark.parametrize("layout", ["inputs alone", "blocks of both"])
def test_it_is_a_pytree_that_jit_and_vmap_take(layout):
    tensor, *_ = make(layout)
    x = jax.random.normal(jax.random.key(2), (3, 48))
    np.testing.assert_allclose(dense(tensor), tensor.dequantize(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(product(tensor, x), tensor.matmul(x), rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), tensor)
    batched = jax.jit(jax.vmap(lambda t: t.dequantize()))(stacked)
    np.testing.assert_allclose(batched[1], dense(tensor), rtol=1e-6, atol=1e-6)
    leaves, structure = jax.tree.flatten(tensor)
    rebuilt = jax.tree.unflatten(structure, leaves)
    rebuilt.validate()
    assert (rebuilt.row_block, rebuilt.column_block) == LAYOUTS[layout]


def test_zeros_stay_zeros():
    inner = rtn(bits=4, group_size=None).compress(jnp.zeros((24, 48)), None)
    _, _, su, sv = make("all outputs")
    tensor = RotatedTensor.from_signs(inner, su, sv, 4)
    assert not dense(tensor).any()
    assert not product(tensor, jnp.ones((2, 48))).any()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"signs_in": jnp.zeros(5, jnp.uint8)}, r"signs_in.shape=\(5,\) does not hold 48 signs"),
        ({"signs_out": None}, "row_block=4 goes with signs_out, and one is missing"),
        ({"row_block": None}, "row_block=None goes with signs_out"),
        ({"row_block": 5}, "row_block=5 does not divide 24 rows"),
        ({"row_block": 0}, "row_block=0 does not divide 24 rows"),
        ({"row_block": 8}, r"signs_out.shape=\(6, 1\) does not hold 24 signs in blocks of 8"),
        ({"column_block": 7}, "column_block=7 does not divide 48 columns"),
    ],
)
def test_validate_says_what_does_not_fit(change, sentence):
    tensor, *_ = make()
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(tensor, **change).validate()


def test_validate_reaches_the_inner_tensor():
    tensor, *_ = make()
    broken = dataclasses.replace(tensor, weight=dataclasses.replace(tensor.weight, columns=80))
    with pytest.raises(ValueError, match="does not hold 24 rows of 80 codes"):
        broken.validate()


def test_a_row_block_that_does_not_divide_is_refused():
    tensor, _, su, sv = make("all outputs")
    with pytest.raises(ValueError, match="row_block=7 must divide the output dimension"):
        RotatedTensor.from_signs(tensor.weight, su, sv, 7)
