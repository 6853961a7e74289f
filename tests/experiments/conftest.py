import functools

import pytest

from tests.experiments import tiny


@pytest.fixture
def config(tmp_path):
    """compose(*overrides, name=...) for the tiny model, with runs below tmp_path / "runs"."""
    return functools.partial(tiny.config, tmp_path)
