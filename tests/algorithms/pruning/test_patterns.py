"""What stays, against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.pruning.patterns import Pattern, of_blocks, top


def sorted_top(scores, count):
    order = np.argsort(-scores, axis=-1, kind="stable")
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order[..., :count], True, -1)
    return found


@pytest.mark.parametrize("n", [1, 4, 16, 17, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_largest_are_those_of_a_sort(n, dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(n)
        scores = rng.choice([-np.inf, -2.5, -1e-37, -0.0, 0.0, 1e-37, 3.5, np.inf], (5, n))
        scores[3:] = rng.normal(size=(2, n)) * 10.0 ** rng.integers(-30, 30, (2, n))
        scores = jnp.asarray(scores, dtype)
        wide = np.asarray(scores, np.float64)
        for count in {0, 1, n // 2, n - 1, n}:
            found = jax.jit(top, static_argnums=1)(scores, count)
            np.testing.assert_array_equal(found, sorted_top(wide, count))


@pytest.mark.parametrize("n", [8, 40])
def test_each_row_may_keep_its_own_number_and_nan_goes_first(n):
    scores = jnp.ones((3, n)).at[:, 0].set(jnp.nan).at[1].set(jnp.nan)
    found = top(scores, jnp.array([0, 2, n - 1]))
    np.testing.assert_array_equal(found.sum(-1), [0, 2, n - 1])
    assert not found[2, 0]  # the last that would stay


def test_of_equal_ones_the_first_stay():
    mask = of_blocks(jnp.array([[1.0, 1, 1, 1, 0, 0, 0, 0]]), 2, 4)
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0, 1, 1, 0, 0]])


def test_patterns_count_as_the_official_codes():
    """int(n · sparsity) weights go: of each row, or of all."""
    scores = jnp.abs(jax.random.normal(jax.random.key(0), (6, 50)))
    third = Pattern(sparsity=1 / 3)
    np.testing.assert_array_equal((~third.of_rows(scores)).sum(1), 16)
    assert (~third.of_all(scores)).sum() == 100
    blocks = Pattern(keep=2, block=5)
    np.testing.assert_array_equal(blocks.of_all(scores), blocks.of_rows(scores))
    np.testing.assert_array_equal(blocks.of_rows(scores).reshape(6, 10, 5).sum(-1), 2)
    assert Pattern(sparsity=0).of_rows(scores).all()


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"sparsity": 1.0}, "sparsity=1.0 must be from 0 to below 1"),
        ({"sparsity": -0.1}, "sparsity=-0.1 must be from 0"),
        ({"keep": 2}, "keep=2 and block=None come together or not at all"),
        ({"keep": 4, "block": 4}, "keep=4 must be from 1 to block=4 - 1"),
    ],
)
def test_what_is_no_pattern_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Pattern(**settings)


def test_blocks_that_do_not_divide_a_row_are_refused():
    with pytest.raises(ValueError, match="block=4 must divide the input dimension .* is 6"):
        Pattern(keep=2, block=4).of_rows(jnp.ones((2, 6)))
