"""Compiled programs are kept for all tests of a session, those in processes of their own too.

Most of a test's time is their compilation, and most of that LLVM's optimization, which for tiny
models never pays: it is left out.
"""

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
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(
                    pytest.mark.skip(reason="long, or much like another: run with --slow")
                )


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what was imported is not searched again by each collection, a tenth of the time
