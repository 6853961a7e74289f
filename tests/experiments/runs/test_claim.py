import os
import signal
import subprocess
import sys
import time

import pytest

from experiments.errors import UserError
from experiments.runs import claim
from experiments.runs.claim import claimed
from tests.experiments import tiny

HOLD = """
import sys, time
from pathlib import Path
from experiments.runs.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_living_process_keeps_its_claim(tmp_path, holder):
    with pytest.raises(UserError, match=f"being worked on by process {holder.pid} .*is alive"):
        with claimed(tmp_path):
            raise AssertionError("both hold it")


def test_a_dead_process_loses_its_claim_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / claim.FILE).exists()
    with claimed(tmp_path) as mine:
        mine.check()
    assert not (tmp_path / claim.FILE).exists()


def test_a_machine_that_is_silent_for_long_loses_its_claim(tmp_path, holder, monkeypatch):
    """Stopped, as a machine that sleeps: its claim is another host's to this process."""
    holder.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(claim, "_this_machine", lambda: "another")
    with monkeypatch.context() as patched:
        patched.setattr(claim, "LEASE", 60.0)  # the holder's: leases must agree on it
        patched.setattr(claim.filelock.SoftFileLease, "_marker_unchanged_for", lambda *_: 61.0)
        with claimed(tmp_path) as mine:
            mine.check()


def test_whoever_lost_a_claim_writes_nothing_more(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "LEASE", 0.3)
    with claimed(tmp_path) as mine:
        mine.check()
        (tmp_path / claim.FILE).unlink()
        (tmp_path / claim.FILE).write_text("another's")
        deadline = time.monotonic() + 10
        with pytest.raises(UserError, match="Another process took over"):
            while time.monotonic() < deadline:
                mine.check()
                time.sleep(0.05)
