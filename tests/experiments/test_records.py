from types import SimpleNamespace

import psutil
import pytest

from experiments import records
from experiments.runs.identity import SEEDS


class Times(SimpleNamespace):
    def _asdict(self):
        return vars(self)


@pytest.fixture
def recorder():
    config = {"seeds": dict.fromkeys(SEEDS, 0)}
    return records.Recorder("compress", config, "0" * 64)


@pytest.fixture
def machine(monkeypatch):
    """A machine of 4 cores whose clock goes on by what a test says was spent on it."""
    spent = {"wall": 0.0, "own": 0.0, "others": 0.0, "stolen": 0.0}

    def times():
        user = spent["own"] + spent["others"]
        return Times(user=user, idle=9e9, iowait=9e9, guest=user, steal=spent["stolen"])

    own = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=spent["own"], system=0.0))
    monkeypatch.setattr(psutil, "cpu_times", times)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "Process", lambda: own)
    monkeypatch.setattr(records.time, "perf_counter", lambda: spent["wall"])
    return spent


@pytest.mark.parametrize(
    "others, stolen, share", [(0.0, 0.0, 0.0), (20.0, 0.0, 0.5), (0.0, 10.0, 0.25)]
)
def test_a_phase_notes_what_other_work_took(recorder, machine, others, stolen, share):
    with recorder.phase("compress"):
        machine["wall"] += 10
        machine["own"] += 17
        machine["others"] += others
        machine["stolen"] += stolen
    record = recorder.finish()
    assert record["seconds"]["compress"] == 10
    assert record["elsewhere"]["compress"] == pytest.approx(share)


def test_the_real_clocks_are_read(recorder):
    with recorder.phase("compress"):
        sum(range(10**6))
    assert 0 <= recorder.finish()["elsewhere"]["compress"] <= 1
