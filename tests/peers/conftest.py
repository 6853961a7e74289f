"""The Pythons of the peers' environments, which `make test-peers` builds and names."""

import os

import pytest


def _environment(name: str) -> str:
    path = os.environ.get(name)
    if not path:
        pytest.skip(f"{name} is unset: run `make test-peers`")
    return path


@pytest.fixture(scope="session")
def python() -> str:
    """Of transformers, compressed-tensors, llm-compressor, lm-eval."""
    return _environment("PLANISH_PEERS_PYTHON")


@pytest.fixture(scope="session")
def layouts() -> str:
    """Of GPTQModel and AutoAWQ."""
    return _environment("PLANISH_LAYOUTS_PYTHON")


@pytest.fixture(scope="session")
def sparse() -> str:
    """Of compressed-tensors 0.14."""
    return _environment("PLANISH_SPARSE_PYTHON")


@pytest.fixture(scope="session")
def llama() -> str:
    """Of llama.cpp."""
    return _environment("PLANISH_LLAMACPP_PYTHON")
