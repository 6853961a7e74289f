"""What every command sets up before it runs."""

import jax
import jax.numpy as jnp
import pytest

from experiments import entry


@pytest.fixture
def before():
    """The setting as it was, put back."""
    value = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", None)
    yield
    jax.config.update("jax_default_matmul_precision", value)


def asked() -> str:
    x = jnp.ones((2, 2))
    return jax.jit(lambda x: x @ x).lower(x).as_text()


def test_products_of_float32_are_in_float32(before, monkeypatch):
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    assert "HIGHEST" not in asked()
    entry.prepare()
    assert "HIGHEST" in asked()


def test_who_asks_for_less_has_it(before, monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "tensorfloat32")
    entry.prepare()
    assert "HIGHEST" not in asked()
