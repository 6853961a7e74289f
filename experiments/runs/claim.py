"""One process at a time works on a run: a lease with a heartbeat beside the run's files.

A dead process of this machine loses its claim at once. One on another machine, which cannot be
looked at, loses it when its heartbeat was not seen for LEASE seconds.
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from experiments.errors import UserError
from experiments.progress import console

LEASE = 60.0  # seconds without a heartbeat after which a claim is stale; the same for everyone
MOMENT = 1.0  # seconds: enough to find that an owner on this machine is dead
FILE = ".claim"


class Claim:
    """A held claim. `check` before anything is put in place for good."""

    def __init__(self, lease: filelock.SoftFileLease, folder: Path):
        self._lease, self._folder = lease, folder

    def check(self) -> None:
        """Raise UserError if another process has taken over, as after a long sleep of this one."""
        if self._lease.compromise is not None:
            raise UserError(
                f"Another process took over {self._folder}, as this one gave no sign of life for "
                f"{LEASE:.0f} s: nothing more is written here; let that one finish."
            )


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Claim]:
    """Hold the run's claim. Raises UserError if another process that is alive holds it."""
    lease = filelock.SoftFileLease(
        folder / FILE, lease_duration=LEASE, thread_local=False, poll_interval=0.1
    )
    _acquire(lease, folder)
    try:
        yield Claim(lease, folder)
    finally:
        lease.release()


def _acquire(lease: filelock.SoftFileLease, folder: Path) -> None:
    try:
        with contextlib.suppress(filelock.Timeout):
            lease.acquire(timeout=MOMENT)
            return
        owner = lease.owner
        if owner is None or owner.hostname != _this_machine():
            console.print(f"{folder} is claimed elsewhere: waiting {LEASE:.0f} s for a heartbeat.")
            with contextlib.suppress(filelock.Timeout):
                lease.acquire(timeout=1.2 * LEASE)
                return
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): choose another place for runs with "
            "runs=..."
        ) from error
    who = "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"
    raise UserError(
        f"{folder} is being worked on by {who}, which is alive: wait for it, or stop it and run "
        "the same command again."
    )


@functools.cache
def _this_machine() -> str:
    """What the lease calls this machine (and container): read off one of our own."""
    with tempfile.TemporaryDirectory() as folder:
        with filelock.SoftFileLease(Path(folder) / FILE) as lease:
            assert lease.owner is not None
            return lease.owner.hostname
