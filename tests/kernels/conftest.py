import pytest

from kernels import aot
from tests.kernels import suite

pytest_generate_tests = suite.pytest_cases


@pytest.fixture(autouse=True)
def what_is_here(request):
    """Skip what this machine cannot do, and say why."""
    if request.node.get_closest_marker("aot") and (reason := aot.lacking()) is not None:
        pytest.skip(reason)
    if request.node.get_closest_marker("gpu"):
        suite.require_gpu()


@pytest.fixture(autouse=True)
def no_races(capsys):
    """Mosaic's interpreter prints what it finds, and goes on."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out
