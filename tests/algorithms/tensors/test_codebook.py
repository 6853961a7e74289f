"""Codes into codebooks: the dense form, pieces, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.tensors.codebook import CodebookTensor, code_dtype


def tensor(o=5, g=3, m=2, k=7, c=4):
    rng = np.random.default_rng(0)
    return CodebookTensor(
        jnp.asarray(rng.integers(0, k, (o, g, m)), code_dtype(k)),
        jnp.asarray(rng.normal(size=(m, k, c)), jnp.float16),
        jnp.asarray(rng.normal(size=o), jnp.float16),
    )


@pytest.mark.parametrize(("m", "k"), [(1, 7), (3, 7), (2, 300)])
def test_the_dense_form_adds_entries_one_by_one(m, k):
    given = tensor(m=m, k=k)
    given.validate()
    codes, codebooks, scale = (np.asarray(x) for x in (given.codes, given.codebooks, given.scale))
    expected = np.zeros((5, 12))
    for o in range(5):
        for j in range(12):
            parts = [codebooks[n, codes[o, j // 4, n], j % 4] for n in range(m)]
            expected[o, j] = float(scale[o]) * np.sum(parts, dtype=np.float64)
    assert given.shape == (5, 12) and given.group_size == 4
    assert given.dequantize().dtype == jnp.float32
    np.testing.assert_allclose(given.dequantize(), expected, rtol=1e-5, atol=1e-6)
    assert given.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    x = jnp.ones((2, 3, 12))
    np.testing.assert_allclose(given.matmul(x)[1, 2], expected.sum(1), rtol=1e-4, atol=1e-4)


def test_codes_above_a_byte_take_two():
    assert code_dtype(256) == jnp.uint8 and code_dtype(257) == jnp.uint16
    large = tensor(k=300)
    assert large.codes.dtype == jnp.uint16
    assert large.storage_bits() == 16 * (5 * 3 * 2 + 2 * 300 * 4 + 5)
    assert tensor().storage_bits() == 8 * 5 * 3 * 2 + 16 * (2 * 7 * 4 + 5)


def test_pieces_are_complete():
    given = tensor()
    pieces = given.split([2, 0, 3])
    assert [piece.shape for piece in pieces] == [(2, 12), (0, 12), (3, 12)]
    for piece in pieces:
        piece.validate()
        np.testing.assert_array_equal(piece.codebooks, given.codebooks)
    joined = jnp.concatenate([piece.dequantize() for piece in pieces])
    np.testing.assert_array_equal(joined, given.dequantize())


def test_is_a_pytree_that_jit_takes_and_gives():
    given = tensor()
    again = jax.jit(lambda t: t)(given)
    assert jax.tree.structure(again) == jax.tree.structure(given)
    np.testing.assert_array_equal(again.dequantize(), given.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(codebooks=jnp.zeros((3, 7, 4))), r"codebooks.shape=\(3, 7, 4\) must be \[m, k, c\]"),
        (dict(scale=jnp.zeros(4)), r"scale.shape=\(4,\) must be \(5,\)"),
        (dict(codes=jnp.zeros((5, 3, 2), jnp.int32)), "codes.dtype=int32 must be uint8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tensor(), **change).validate()
