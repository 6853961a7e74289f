"""What this process holds, and what of it is given back."""

import contextlib
import ctypes
import gc
import mmap
import platform
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Of malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -3, -4, -8
MMAP_MAX = 65536  # glibc's own
PART = 1 << 22  # values
MAPPINGS = 24_000  # Linux allows a process 65,530 (vm.max_map_count) and ends it at one more


def keep_freed() -> None:
    """Have glibc reuse the memory of freed arrays instead of giving it back at once.

    Every product allocates its result, and the kernel clears each page that it hands out again: a
    tenth of a CPU run's time, and a third of a small model's training step. It costs memory, since
    what is kept fits few of the later arrays: `give_back` between blocks.
    """
    _mallopt(M_ARENA_MAX, 1)  # those of further threads are too small for large arrays
    _mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the largest it takes
    _mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
    _mallopt(M_TOP_PAD, 1 << 26)


@contextlib.contextmanager
def kept_whole() -> Iterator[None]:
    """Have arrays of any size reuse the memory of freed ones, for what does the same again and
    again: beyond `keep_freed`'s largest, each costs fresh pages, the temporaries of a small model's
    training step two fifths of its time.
    """
    _mallopt(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        _mallopt(M_MMAP_MAX, MMAP_MAX)
        give_back()


def _mallopt(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).mallopt(option, value)


def give_back() -> None:
    """Give the memory of freed arrays back to the system."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone keeps, and can trim, a heap
        ctypes.CDLL(None).malloc_trim(0)


def drop_programs() -> None:
    """Forget what JAX compiled, once its mappings come near the system's limit.

    On a CPU every compiled program is mapped, in several pieces: a process that makes hundreds of
    runs, each of shapes of its own, would end without a word. What is needed again comes from the
    compilation cache.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as maps:
        if sum(1 for _ in maps) > MAPPINGS:
            jax.clear_caches()


def in_parts(x: np.ndarray) -> Iterator[np.ndarray]:
    """The values of an array, some at a time; of a mapped file, the pages of a part are given back
    when the next one is asked for: the system counts them as the process's own.
    """
    flat = x.reshape(-1)
    for n in range(0, flat.size, PART):
        yield flat[n : n + PART]
        _let_go(flat)


def _let_go(x: np.ndarray) -> None:
    base: Any = x
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def reset_peak() -> None:
    """Start a new peak where the system can (Linux); elsewhere it stays the process's own."""
    gc.collect()
    give_back()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of the largest resident set since `reset_peak`."""
    return _of_status("VmHWM") or _largest_ever()


def held() -> int:
    """Bytes resident now; where the system does not say (Linux does), the most there ever were."""
    return _of_status("VmRSS") or _largest_ever()


def _of_status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _largest_ever() -> int:
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if platform.system() == "Darwin" else largest * 1024
