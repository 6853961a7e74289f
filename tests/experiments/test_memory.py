"""What a process gives back."""

import sys

import jax
import pytest

from experiments import memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its mappings")
def test_programs_are_dropped_when_their_mappings_are_many(monkeypatch):
    double = jax.jit(lambda x: 2 * x)
    double(1.0)
    monkeypatch.setattr(memory, "MAPPINGS", 1_000_000)
    memory.drop_programs()
    assert double._cache_size() == 1
    monkeypatch.setattr(memory, "MAPPINGS", 1)
    memory.drop_programs()
    assert double._cache_size() == 0
    assert double(1.0) == 2
