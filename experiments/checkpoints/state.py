"""The state of a training run, kept with Orbax: parameters, optimizer state, keys, data position.

    <folder>/<step>/state      the leaves of the state by their path, as Orbax writes a tree
    <folder>/<step>/facts      JSON: what each leaf is, `extra`, SHA-256 of all of it
    <folder>/damaged-<step>    a step that did not match its SHA-256, moved out of the way

A step appears whole or not at all, also if the process is killed. Orbax has no checksum over a
whole step, hence the digest.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.text import Text

from experiments.checkpoints.leaves import (
    Leaf,
    describe,
    digest,
    fitted,
    flat,
    leaf,
    storable,
    stored,
    targets,
)
from experiments.errors import UserError
from experiments.progress import console


class Restored(NamedTuple):
    """A step as it was saved."""

    step: int
    state: Any
    extra: dict[str, Any]


def _warn(sentence: str) -> None:
    console.print("[bold yellow]warning:[/]", Text(sentence), soft_wrap=True)


class StateKeeper:
    """Saves steps of a pytree into a folder, in the background, and gives back the newest.

    Leaves are arrays of JAX or NumPy, typed PRNG keys and Python numbers; an nnx module's state
    goes in as `nnx.to_pure_dict(state)`. What is no array, such as the position of a data iterator,
    goes into `extra`. Arrays must be addressable from this process.
    """

    def __init__(self, folder: Path | str, keep: int = 2, *, warn: Callable[[str], None] = _warn):
        """keep: how many of the newest steps stay. warn: takes a sentence about a damaged step."""
        if keep < 1:
            raise UserError(f"keep={keep} is too small: keep 1 step at least.")
        self.folder, self._warn = Path(folder).expanduser().absolute(), warn
        self._pending: Future | None = None
        self._worker = ThreadPoolExecutor(1, "state-keeper")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            enable_async_checkpointing=False,  # the thread is ours, to have the digest off the loop
            cleanup_tmp_directories=True,  # what a killed process left
            create=False,  # which several processes would wait for each other to do
            multiprocessing_options=_alone(),
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot hold the state of a run ({error.strerror}): choose a folder "
                "that can be written."
            ) from error

    def __enter__(self) -> "StateKeeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> None:
        """Take a copy of `state` and write it in the background; waits for the step before it.

        extra: whatever JSON holds. Raises UserError if the step before could not be written, and
        ValueError for a step that is not the newest or a leaf that is no array.
        """
        leaves = {name: stored(name, leaf) for name, leaf in flat(state).items()}
        text = json.dumps(dict(extra or {}))
        self.wait()
        if (last := self._manager.latest_step()) is not None and step <= last:
            raise ValueError(f"step={step} must be greater than the last one saved, {last}.")
        self._pending = self._worker.submit(self._write, step, leaves, json.loads(text))

    def wait(self) -> None:
        """Return when the step being written is whole; raises UserError if it cannot be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and let go of the folder."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def latest(self, template: Any) -> Restored | None:
        """The newest step that is whole, or None where nothing was saved.

        template: a pytree like the one saved, of arrays or `jax.ShapeDtypeStruct`: leaves come back
        bit for bit, in its structure and on its devices, a scalar's weak type included.
        Raises UserError if it does not fit, or if every step is damaged.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for n, step in enumerate(steps):
            try:
                leaves, extra = self._read(step)
            except MemoryError:
                raise
            except Exception as error:  # Orbax raises nothing narrower for what is damaged
                self._set_aside(step, error, before=steps[n + 1 : n + 2])
                continue
            return Restored(step, fitted(template, leaves, f"{self.folder}, step {step}"), extra)
        if any(self.folder.glob("damaged-*")):  # also if an earlier start set it aside
            raise UserError(
                f"Every state in {self.folder} is damaged: delete the folder to start anew."
            )
        return None

    def _write(self, step: int, leaves: Mapping[str, Leaf], extra: dict[str, Any]) -> None:
        described = {name: describe(x) for name, x in leaves.items()}
        facts: dict[str, Any] = {"step": step, "leaves": described, "extra": extra}
        facts["digest"] = digest(facts, leaves)
        arrays = {name: storable(leaf.data) for name, leaf in leaves.items() if leaf.data.size}
        items = {"facts": ocp.args.JsonSave(facts)}
        if arrays:
            items["state"] = ocp.args.StandardSave(arrays)
        try:
            with _quiet():
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except Exception as error:  # as above
            raise UserError(
                f"Saving step {step} in {self.folder} failed ({_line(error)}): make room or choose "
                "another folder; the steps before it are kept."
            ) from error

    def _read(self, step: int) -> tuple[dict[str, Leaf], dict[str, Any]]:
        """What was stored; raises whatever tells that it is damaged."""
        items = ocp.args.Composite(facts=ocp.args.JsonRestore())
        with _quiet():
            facts = self._manager.restore(step, args=items)["facts"]
            described = facts["leaves"]
            arrays: Mapping[str, np.ndarray] = {}
            if any(0 not in d["shape"] for d in described.values()):
                items = ocp.args.Composite(state=ocp.args.StandardRestore(targets(described)))
                arrays = self._manager.restore(step, args=items)["state"]
        leaves = {name: leaf(d, arrays.get(name)) for name, d in described.items()}
        if facts.pop("digest") != digest(facts, leaves):
            raise ValueError("its content does not match its SHA-256")
        return leaves, facts["extra"]

    def _set_aside(self, step: int, error: Exception, before: Sequence[int]) -> None:
        aside = self.folder / f"damaged-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        self._manager.reload()
        instead = f"step {before[0]} is used instead" if before else "there is none before it"
        self._warn(
            f"Step {step} in {self.folder} is damaged ({_line(error)}): it was moved to "
            f"{aside.name}, and {instead}."
        )


def _alone() -> ocp.options.MultiprocessingOptions:
    """Of several processes, the one that keeps the states waits for no other."""
    here = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix="state-keeper"
    )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that Orbax logs of errors that it then raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
