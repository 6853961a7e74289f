"""What a process gives back."""

import subprocess
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


# In a process of its own: what other tests left free would do as well as new memory.
LARGE = """
import numpy as np
from experiments import memory

def mapped():
    at = np.empty(1 << 27, np.uint8).__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        heap = next(line for line in maps if "[heap]" in line).split()[0]
    low, high = (int(edge, 16) for edge in heap.split("-"))
    return not low <= at < high

print(mapped())
with memory.kept_whole():
    print(mapped())
try:
    with memory.kept_whole():
        raise KeyError
except KeyError:
    print(mapped())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone can be told what it keeps")
def test_large_arrays_are_mapped_anew_except_where_they_are_kept():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
