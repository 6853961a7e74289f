"""Compiled programs are kept for all tests of a session, those in processes of their own too.

Most of a test's time is their compilation, and most of that LLVM's optimization, which for tiny
models never pays: it is left out.
"""

import collections
import gc
import itertools
import os
import tempfile

import pytest

CACHE = tempfile.TemporaryDirectory(prefix="planish-tests-xla-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE.name)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

ENDED = itertools.count(1)  # tests of this process


def pytest_runtest_teardown():
    from experiments import memory  # not sooner: JAX reads its settings when it is imported

    if next(ENDED) % 16 == 0:
        memory.drop_programs()


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/configs anew: look at their difference before you commit it",
    )
    parser.addoption(
        "--slow", action="store_true", help="run what takes long, or is much like another test, too"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in [*others(items), *(i for i in items if i.get_closest_marker("slow"))]:
            item.add_marker(pytest.mark.skip(reason="long, or much like another: run with --slow"))


def others(items):
    """Those of a test with `some` of its parameters that are none of them."""
    tests = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("some"):
            tests[item.path, item.parent.name, item.originalname].append(item)
    for same in tests.values():
        chosen = same[0].get_closest_marker("some").args
        if isinstance(chosen[0], int):
            count = min(chosen[0], len(same))
            spread = {n * (len(same) - 1) // max(count - 1, 1) for n in range(count)}
            yield from (item for n, item in enumerate(same) if n not in spread)
        else:
            assert any(item.callspec.id in chosen for item in same), same[0]
            yield from (item for item in same if item.callspec.id not in chosen)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what was imported is not searched again by each collection, a tenth of the time
