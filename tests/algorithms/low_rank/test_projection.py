"""Where few of many directions are found by products alone, and that they serve as well."""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.low_rank import projection

FLAT = 0.99  # of what the best directions keep of an error whose spectrum is flat


def kept(u, m):
    return float(jnp.sum((u.T @ m) ** 2))


def test_sketches_are_for_few_of_many():
    assert not projection.few_of_many(32, 576)  # of SmolLM2-135M: all of its recorded runs
    assert projection.few_of_many(32, 1024) and not projection.few_of_many(65, 1024)
    assert not projection.few_of_many(3276, 4096)  # what SVD-LLM leaves


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_products_find_what_factorizations_find(monkeypatch, shape):
    rng = np.random.default_rng(0)
    o, i = shape
    e = jnp.asarray(rng.normal(size=(o, 3)) @ rng.normal(size=(3, i)), jnp.float32)  # of rank 3
    x = jnp.asarray(rng.normal(size=(i, i // 2)), jnp.float32)
    gram = x @ x.T  # singular
    exact = projection.leading(e, 3), projection.leading_in_output(e, gram, 3)
    monkeypatch.setattr(projection, "MANY", 64)
    found = projection.leading(e, 3), projection.leading_in_output(e, gram, 3)
    for one, other in zip(exact, found, strict=True):
        assert one.shape == other.shape == (o, 3)
        np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-4)
    again = projection.leading(e, 3)
    np.testing.assert_array_equal(found[0], again)  # the same directions each time


@pytest.mark.parametrize("shape", [(1024, 1040), (1040, 1024)])
def test_of_errors_as_roundings_products_keep_nearly_all(monkeypatch, shape):
    rng = np.random.default_rng(1)
    e = jnp.asarray(rng.uniform(-1, 1, shape) * np.exp(rng.normal(size=shape[1])), jnp.float32)
    found = kept(projection.leading(e, 32), e)
    monkeypatch.setattr(projection, "MANY", 4096)
    exact = kept(projection.leading(e, 32), e)
    assert FLAT * exact < found < exact < 0.6 * kept(jnp.eye(shape[0]), e)
