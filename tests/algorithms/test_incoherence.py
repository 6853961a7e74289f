"""Incoherence processing against a port of the official code, its theory, and plain rounding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import incoherence
from kernels.hadamard import factor, hadamard_matrix
from tests.algorithms import incoherence_official as official
from tests.algorithms.integers import rtn


def layer(seed, o=24, i=48, outliers=True):
    """W with a few columns and single weights that stand out, and G of correlated activations."""
    rng = np.random.default_rng(seed)
    w, x = rng.standard_normal((o, i)), rng.standard_normal((100, i)) @ rng.standard_normal((i, i))
    if outliers:
        w[:, 3] *= 20
        w[rng.integers(0, o, 5), rng.integers(0, i, 5)] += 50
    return w, x.T @ x


def random_signs(seed, *sizes):
    rng = np.random.default_rng(seed)
    return [rng.choice(np.array([-1, 1], np.int8), n) for n in sizes]


def rotation(signs, block=None):
    """U with x Uᵀ = rotate(x, signs), as a float64 matrix."""
    block = block or len(signs)
    h = np.kron(np.eye(len(signs) // block), hadamard_matrix(block)) / math.sqrt(block)
    return (np.diag(signs) @ h).T


@pytest.mark.parametrize("o, i", [(16, 64), (8, 48), (48, 20), (40, 12)])
def test_agrees_with_the_official_code(x64, o, i):
    """To float64's rounding, given our matrices of the orders that are no power of two."""
    w, gram = layer(o + i, o, i)
    sv, su = random_signs(0, o, i)
    tables = [hadamard_matrix(factor(n)[0]).astype(float) for n in (i, o)]
    rotated, h = incoherence.process(*map(jnp.asarray, (w, gram, sv, su)))
    np.testing.assert_allclose(rotated, official.rht_w(w, su, sv, *tables), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(h, official.rht_h(gram, su, tables[0]), rtol=1e-9, atol=1e-9)

    back = incoherence.unrotate_weight(rotated, jnp.asarray(su), jnp.asarray(sv))
    undone = official.incoherence_process(np.asarray(rotated), su, sv, *tables)
    np.testing.assert_allclose(back, undone, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(back, w, rtol=1e-9, atol=1e-12)


def test_deviation_3_the_matrix_of_order_12_is_another_one():
    """Theirs is Hadamard as well, so nothing but the choice of the rotation differs."""
    theirs, ours = official.had12(), hadamard_matrix(12)
    np.testing.assert_array_equal(theirs @ theirs.T, 12 * np.eye(12))
    assert (theirs != ours).any()


@pytest.mark.parametrize("n, block", [(12, None), (36, 12), (40, 4), (6, 1)])
def test_rotate_is_a_product_with_an_orthogonal_matrix(x64, n, block):
    (signs,) = random_signs(1, n)
    u, x = rotation(signs, block), np.random.default_rng(2).standard_normal((2, 3, n))
    np.testing.assert_allclose(u @ u.T, np.eye(n), atol=1e-14)
    found = incoherence.rotate(jnp.asarray(x), jnp.asarray(signs), block)
    np.testing.assert_allclose(found, x @ u.T, rtol=1e-12, atol=1e-13)
    back = incoherence.unrotate(found, jnp.asarray(signs), block)
    np.testing.assert_allclose(back, x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("row_block, column_block", [(None, None), (8, None), (4, 16)])
def test_process_is_v_w_ut_and_u_g_ut(x64, row_block, column_block):
    w, gram = layer(3)
    sv, su = random_signs(3, 24, 48)
    v, u = rotation(sv, row_block), rotation(su, column_block)
    arrays = map(jnp.asarray, (w, gram, sv, su))
    rotated, h = incoherence.process(*arrays, row_block, column_block)
    np.testing.assert_allclose(rotated, v @ w @ u.T, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(h, u @ gram @ u.T, rtol=1e-9, atol=1e-8)
    np.testing.assert_array_equal(h, h.T)


@pytest.mark.parametrize("outputs", [True, False])
def test_errors_measure_the_same_on_either_side(x64, outputs):
    """tr(ΔW G ΔWᵀ): what is near in rotated coordinates is as near in the original ones."""
    w, gram = layer(4)
    sv, su = map(jnp.asarray, random_signs(4, 24, 48))
    out = (sv, 4) if outputs else (None, None)
    rotated, h = incoherence.process(jnp.asarray(w), jnp.asarray(gram), out[0], su, out[1])
    rough = jnp.round(rotated)
    there = rough - rotated
    back = incoherence.unrotate_weight(rough, su, *out) - w
    expected = np.trace(np.asarray(there @ h @ there.T))
    np.testing.assert_allclose(np.trace(back @ gram @ back.T), expected, rtol=1e-9)


def test_rows_stay_in_their_blocks(x64):
    """A block of rows rotates as it would alone, so stacked readers can be taken apart."""
    w, gram = layer(5)
    sv, su = map(jnp.asarray, random_signs(5, 24, 48))
    w = jnp.asarray(w)
    whole, _ = incoherence.process(w, jnp.asarray(gram), sv, su, row_block=8)
    for a, b in ((0, 16), (16, 24)):
        piece, _ = incoherence.process(w[a:b], jnp.asarray(gram), sv[a:b], su, row_block=8)
        np.testing.assert_allclose(whole[a:b], piece, rtol=1e-12, atol=1e-12)


def test_common_block_lets_every_reader_rotate():
    assert incoherence.common_block([576, 192, 192]) == 192
    assert incoherence.common_block([64, 24]) == 8
    assert incoherence.common_block([14]) == 2 and incoherence.common_block([14, 7]) == 1


@pytest.mark.parametrize("o, i", [(32, 64), (20, 48)])
def test_lemma_3_1_bounds_the_largest_weight_and_entry(o, i):
    """With probability 1 - δ each, whatever W and G: one spike, one direction."""
    delta = 0.01
    w = np.zeros((o, i), np.float32)
    w[3, 5] = 1
    gram = np.zeros((i, i), np.float32)
    gram[7, 7] = 1
    assert float(incoherence.incoherence(jnp.asarray(w))) == pytest.approx(math.sqrt(o * i))
    rng, process = np.random.default_rng(6), jax.jit(incoherence.process)
    for matrix in (w, rng.standard_cauchy((o, i)).astype(np.float32), np.ones_like(w)):
        key = jax.random.key(7)
        sv, su = (incoherence.signs(jax.random.fold_in(key, n), n) for n in (o, i))
        rotated, h = process(jnp.asarray(matrix), jnp.asarray(gram), sv, su)
        mu = float(incoherence.incoherence(rotated))
        assert 0.99 < mu <= 2 * math.log(4 * o * i / delta)
        eigenvectors = np.linalg.eigh(np.asarray(h, np.float64))[1]
        largest = np.abs(eigenvectors[:, -1]).max() * math.sqrt(i)  # of the one direction
        assert largest <= math.sqrt(2 * math.log(2 * i**2 / delta))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_rotated_weights_beats_rounding_them_as_they_are(bits):
    """Weights that stand out spoil a row's grid; rotated, none does. The same bits for both.

    For heavy tails. Where a few weights hold nearly all of ‖W‖², as in `layer`, keeping those alone
    is better at 2 bits: rotation spreads what they are over all the others.
    """
    w = jnp.asarray(np.random.default_rng(8).standard_t(4, (128, 64)), jnp.float32)
    sv, su = map(jnp.asarray, random_signs(8, 128, 64))
    rounded = jax.jit(lambda w: rtn(bits=bits, group_size=None).compress(w, None).dequantize())
    plain, found = rounded(w), rounded(incoherence.rotate_weight(w, su, sv))
    back = incoherence.unrotate_weight(found, su, sv)
    assert jnp.sum((back - w) ** 2) < 0.85 * jnp.sum((plain - w) ** 2)


def test_signs_are_signs_and_follow_the_key():
    a, b = (incoherence.signs(jax.random.key(n), 4096) for n in (0, 1))
    assert a.dtype == jnp.int8 and set(np.unique(a)) == {-1, 1}
    assert abs(float(a.mean(dtype=jnp.float32))) < 0.1
    assert abs(float((a == b).mean()) - 0.5) < 0.1
    np.testing.assert_array_equal(a, incoherence.signs(jax.random.key(0), 4096))


def test_incoherence_of_equal_sizes_is_one_and_of_zeros_zero():
    signs = incoherence.signs(jax.random.key(2), 12).astype(jnp.float32).reshape(3, 4)
    assert float(incoherence.incoherence(5 * signs)) == pytest.approx(1)
    assert float(incoherence.incoherence(jnp.zeros((3, 4)))) == 0


def test_zeros_stay_zeros_and_dead_inputs_finite():
    _, gram = layer(9)
    gram[5] = gram[:, 5] = 0
    sv, su = map(jnp.asarray, random_signs(9, 24, 48))
    w, h = incoherence.process(jnp.zeros((24, 48)), jnp.asarray(gram, jnp.float32), sv, su, 8)
    assert not w.any() and jnp.isfinite(h).all()
    _, h = incoherence.process(w, jnp.zeros((48, 48)), sv, su)
    assert not h.any()


def test_a_row_of_zeros_stays_one_without_rotated_outputs():
    w, gram = layer(10)
    w[4] = 0
    (su,) = map(jnp.asarray, random_signs(10, 48))
    rotated, _ = incoherence.process(
        jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32), None, su
    )
    assert not rotated[4].any() and rotated[5].any()


def test_jit_takes_it_and_the_graph_does_not_grow_with_width():
    def run(w, gram, key):
        sv, su = (incoherence.signs(jax.random.fold_in(key, n), n) for n in w.shape)
        return incoherence.process(w, gram, sv, su, row_block=8)

    w, gram = (jnp.asarray(a, jnp.float32) for a in layer(11))
    for eager, jitted in zip(
        run(w, gram, jax.random.key(0)), jax.jit(run)(w, gram, jax.random.key(0)), strict=True
    ):
        np.testing.assert_allclose(eager, jitted, rtol=1e-5, atol=1e-3)

    def size(o, i):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((o, i), (i, i))]
        return len(jax.make_jaxpr(run)(*shapes, jax.random.key(0)).jaxpr.eqns)

    assert size(24, 16 * 12) == size(2400, 16 * 172) < 100


def test_bad_blocks_are_refused():
    w, gram = (jnp.asarray(a, jnp.float32) for a in layer(12))
    sv, su = map(jnp.asarray, random_signs(12, 24, 48))
    for block in (5, 0, -4, 48):
        with pytest.raises(ValueError, match=f"block={block} must be positive and divide the 24"):
            incoherence.process(w, gram, sv, su, row_block=block)
    with pytest.raises(ValueError, match="block=32 must be positive and divide the 48"):
        incoherence.process(w, gram, None, su, column_block=32)
    with pytest.raises(ValueError, match="n=6 has no Hadamard matrix here"):
        incoherence.process(w, gram, sv, su, row_block=6)
    with pytest.raises(ValueError, match="n=50 has no .* in blocks of 2"):
        incoherence.rotate(jnp.ones((2, 50)), jnp.ones(50, jnp.int8))
