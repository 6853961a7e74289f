"""Does a run survive being killed? The same command, SIGKILLed at random moments until it has been
killed often enough, must end with the bytes of a run that nobody disturbed.

Runs are killed one after the other: when one finishes before its turn to be killed, its bytes are
compared and the next begins. Kills are aimed evenly at the time that an undisturbed run takes.
"""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments import progress
from experiments.errors import UserError
from experiments.runs import journal


def interruptions(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Kill `plain["kills"]` times; raises UserError at the first run whose bytes differ."""
    settings, rng = plain["interrupted"], random.Random(plain["seed"])
    start = time.monotonic()
    reference = _finish(settings, folder / "undisturbed")
    undisturbed = time.monotonic() - start
    moments: list[float] = []
    rounds: list[dict[str, Any]] = []
    with progress.steps("kill", plain["kills"]) as step:
        while len(moments) < plain["kills"]:
            where = folder / f"disturbed-{len(rounds)}"
            aimed = [rng.uniform(0, undisturbed) for _ in range(plain["kills"] - len(moments))]
            hit = _killed_until_finished(settings, where, aimed, step)
            moments += [seconds for seconds, _ in hit]
            rounds.append({"kills": len(hit), "layers_done_at_kill": [done for _, done in hit]})
            _require_equal(_finish(settings, where), reference, where)
            shutil.rmtree(where)
    return {
        "kills": len(moments),
        "runs": len(rounds),
        "undisturbed_seconds": undisturbed,
        "kill_seconds": moments,  # after the start of its process
        "rounds": rounds,
        "files": len(reference),
        "bytes_equal": True,  # or the measurement would have stopped
    }


def _killed_until_finished(settings, where: Path, aimed: list[float], step) -> list:
    """(seconds that the process lived, layers that the run had by then) of each kill."""
    hit = []
    for seconds in aimed:
        process = subprocess.Popen(_command(settings, where), stderr=subprocess.PIPE, text=True)
        try:
            _, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hit.append((seconds, _layers(where)))
            step(f"after {seconds:.1f} s, {hit[-1][1]} blocks kept")
            continue
        if process.returncode:
            raise UserError(f"{where} ended with status {process.returncode}: {error[-500:]}")
        break  # it finished first
    return hit


def _layers(where: Path) -> int:
    entries = [entry for path in where.rglob(journal.FILE) for entry in journal.read(path)]
    return len({entry["layer"] for entry in entries if entry["event"] == "layer"})


def _finish(settings, where: Path) -> dict[str, str]:
    """Run to the end; the SHA-256 of every file of the checkpoint."""
    done = subprocess.run(_command(settings, where), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{where} ended with status {done.returncode}: {done.stderr[-500:]}")
    (checkpoint,) = where.glob("compress/*/*/checkpoint")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _require_equal(found: dict[str, str], reference: dict[str, str], where: Path) -> None:
    differing = sorted(name for name in found | reference if found.get(name) != reference.get(name))
    if differing:
        raise UserError(f"{where} was killed and ended with other bytes in {', '.join(differing)}.")


def _command(settings: list[str], where: Path) -> list[str]:
    return [sys.executable, "-m", "experiments.compress", f"runs={where}", *settings]
