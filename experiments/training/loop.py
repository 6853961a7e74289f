"""The training loop: batches in, a trained state out; killed at any moment, it loses nothing.

State is saved every so many steps, after everything due at that step has been evaluated and
logged. So a resumed run does each step and each evaluation exactly once more than what its state
already stands for, with the same bits.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from algorithms import parametrization, training
from algorithms.optimizers.evaluation import eval_params
from algorithms.optimizers.groups import named
from algorithms.training import Batch, Metrics, Objective, Parts, TrainState
from experiments import memory, progress
from experiments.checkpoints.state import StateKeeper
from experiments.errors import UserError
from experiments.runs.run import OpenRun
from experiments.training import parallel
from experiments.training.data import Examples, Order, chunks
from experiments.training.metrics import FILE, MetricsLog, finite, numbers, read
from models.config import DecoderConfig


class Diverged(UserError):
    """A loss or a gradient that is not finite."""


STATE = "state"  # folder of a run's saved states


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a run is, and what happens how often, in steps."""

    steps: int
    log_every: int = 10
    evaluate_every: int | None = None  # on held-out examples; None: at the end alone
    save_every: int = 100
    keep: int = 2  # saved states
    evaluation_batch: int = 16  # held-out examples at a time

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep", "evaluation_batch"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise UserError(f"evaluate_every={self.evaluate_every} must be at least 1, or null.")

    def due(self, every: int | None, step: int) -> bool:
        """Whether something is, after so many steps; the last step is always."""
        return step == self.steps or (every is not None and step % every == 0)


@dataclasses.dataclass
class Job:
    """What is to be trained, on what, by what."""

    parts: Parts
    objective: Objective
    optimizer: optax.GradientTransformation
    examples: Examples
    order: Order
    pace: Pace
    seed: int
    accumulate: int = 1
    dtype: DTypeLike | None = None
    teacher_graph: Any = None
    teacher: Any = None  # its arrays
    schedule: Callable[[int], float] | None = None  # of the learning rates, for the log
    mesh: Mesh | None = None
    floor: float | None = None  # seconds that a step's operations take at the machine's rate
    config: DecoderConfig | None = None  # of the model, by which it lies on the mesh
    teacher_config: DecoderConfig | None = None

    @functools.cached_property
    def state_layout(self) -> tuple[NamedSharding, ...] | None:
        state = jax.eval_shape(self._initial, self.parts._replace(graph=None))
        return self._layout(state, self.config, self.parts.params)

    @functools.cached_property
    def fixed(self) -> Any:
        """The model's arrays that are not learned, in their places."""
        fixed = self.parts.fixed
        return parallel.put(fixed, self._layout(fixed, self.config, fixed))

    @functools.cached_property
    def taught(self) -> Any:
        """The teacher's arrays, in their places."""
        teacher = self.teacher
        return parallel.put(teacher, self._layout(teacher, self.teacher_config, teacher))

    def _layout(self, tree: Any, config: DecoderConfig | None, params: Any) -> Any:
        if self.mesh is None:
            return None
        return parallel.layout(self.mesh, tree, config, named(params))

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = parallel.put_batch(batch, self.mesh)
        return training.step(
            state, self.fixed, self.taught, batch, graph=self.parts.graph,
            teacher_graph=self.teacher_graph, objective=self.objective, optimizer=self.optimizer,
            accumulate=self.accumulate, dtype=self.dtype, layout=self.state_layout,
        )  # fmt: skip

    def begin(self) -> TrainState:
        """A state of its own memory: the model's arrays are not given away with it."""
        state = jax.tree.map(functools.partial(jnp.array, copy=True), self._initial(self.parts))
        return parallel.put(state, self.state_layout)

    def _initial(self, parts: Parts) -> TrainState:
        return training.init(parts, self.optimizer, jax.random.key(self.seed))

    def trained(self, state: TrainState) -> nnx.Module:
        """The model as it is evaluated and saved."""
        whole = parallel.gather(state)
        model = self.parts.merged(_evaluated(whole.optimizer, whole.params), whole.buffers)
        parametrization.finish(model)
        if hasattr(self.objective, "dismiss"):
            self.objective.dismiss(model)
        return model

    def summary(self, folder: Path) -> dict[str, Any]:
        """What a record says of the run: the last held-out means, and the curves."""
        lines = read(folder / FILE)
        heldout = [(line["step"], line["heldout"]) for line in lines if "heldout" in line]
        return {
            "steps": self.pace.steps,
            "heldout": heldout[-1][1],
            "curve": [[step, found["loss"]] for step, found in heldout],
            "curves": {name: [[step, found[name]] for step, found in heldout]
                       for name in heldout[-1][1] if name != "loss"},
        }  # fmt: skip

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Means over all held-out examples, of the parameters that the optimizer evaluates."""
        params = _evaluated(state.optimizer, state.params)
        key, totals, count = jax.random.key(self.seed), dict[str, float](), 0.0
        for batch in chunks(self.examples.heldout, self.pace.evaluation_batch):
            whole = filled(batch, self.pace.evaluation_batch)
            found = training.evaluate(
                params, state.buffers, self.fixed, self.taught,
                parallel.put_batch(whole, self.mesh), key, graph=self.parts.graph,
                teacher_graph=self.teacher_graph, objective=self.objective, dtype=self.dtype,
            )  # fmt: skip
            for name, total in {"loss": found.loss, **found.watched}.items():
                totals[name] = totals.get(name, 0.0) + float(total)
            count += float(found.positions)
        return {name: total / count for name, total in sorted(totals.items())}


_evaluated = jax.jit(eval_params)


def filled(batch: Batch, size: int) -> Batch:
    """A batch of the size that is compiled: what is added counts nothing."""
    mask = np.ones(batch.targets.shape, np.float32) if batch.mask is None else batch.mask
    lacking = size - len(batch.inputs)

    def longer(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, np.repeat(x[:1], lacking, 0)]) if lacking else x

    none = np.zeros((lacking, *mask.shape[1:]), np.float32)
    return jax.tree.map(longer, batch)._replace(mask=np.concatenate([mask, none]))


def train(job: Job, run: OpenRun | None) -> TrainState:
    """The state after the last step, from wherever an earlier attempt left it.

    run: None in processes that train along and write nothing.
    Raises Diverged if a loss or gradient is not finite.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.kept_whole())
        files = _Nothing() if run is None else stack.enter_context(_Files(run, job.pace.keep))
        state = _resumed(job, files)
        first = int(state.step)
        with progress.steps("train", job.pace.steps, done=first) as tell:
            return _Loop(job, files, tell).go(state, first)


def _resumed(job: Job, files: "_Files | _Nothing") -> TrainState:
    state = job.begin()
    if jax.process_count() == 1:
        return files.latest(state) or state
    template = parallel.gather(state)
    return parallel.share(files.latest(template), template, job.state_layout) or state


class _Files:
    """What a run writes while it trains: metrics and states."""

    def __init__(self, run: OpenRun, keep: int):
        self.run = run
        self.log = MetricsLog(run.folder, run.journal.listeners)
        self.keeper = StateKeeper(run.folder / STATE, keep, warn=run.warn)

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.close()

    def latest(self, template: TrainState) -> TrainState | None:
        """The newest state, the metrics cut back to it; None where none was saved."""
        restored = self.keeper.latest(template)
        self.log.cut(0 if restored is None else restored.extra["metrics"])
        return None if restored is None else restored.state

    def save(self, step: int, state: TrainState) -> None:
        """In the background, but on a CPU, whose cores would do both and whose memory would hold
        the copies and a step's temporaries at once: 15.4 GB in the place of 11.7 for a masked model
        of 135 million parameters.
        """
        self.run.claim.check()
        self.keeper.save(step, state, {"metrics": self.log.sync()})
        if jax.default_backend() == "cpu":
            self.keeper.wait()

    def append(self, **fields: Any) -> None:
        self.log.append(**fields)

    def note(self, event: str, **fields: Any) -> None:
        self.run.note(event, **fields)

    def kept(self) -> str:
        """What is left of the states, for a sentence."""
        self.keeper.wait()
        steps = [int(path.name) for path in (self.run.folder / STATE).glob("[0-9]*")]
        if not steps:
            return "no state had been saved yet"
        return f"the state of step {max(steps)} is kept in {self.run.folder / STATE}"


class _Nothing:
    """In a process that trains along: the first one writes."""

    def latest(self, template: TrainState) -> None:
        return None

    def save(self, step: int, state: TrainState) -> None: ...

    def append(self, **fields: Any) -> None: ...

    def note(self, event: str, **fields: Any) -> None: ...

    def kept(self) -> str:
        return "the first process has the states"


class _Loop:
    """One attempt. The metrics of a step are looked at when the next one is under way, so that
    neither the device nor the host waits.
    """

    def __init__(self, job: Job, files: _Files | _Nothing, tell: Callable[[str], None]):
        self.job, self.files, self.tell = job, files, tell
        self.pending: tuple[int, Metrics] | None = None
        self.clock, self.since = time.perf_counter(), 0
        self.names = training.leaf_names(job.parts.params)

    def go(self, state: TrainState, first: int) -> TrainState:
        job, pace = self.job, self.job.pace
        for n in range(first, pace.steps):
            state, metrics = job.step(state, job.order.draw(job.examples.train, n))
            self.look()
            self.pending = (n + 1, metrics)
            evaluating = pace.due(pace.evaluate_every, n + 1)
            saving = pace.due(pace.save_every, n + 1)
            if evaluating or saving:
                self.look()
            if evaluating:
                self.evaluate(state, n + 1)
            if saving:
                self.files.save(n + 1, parallel.gather(state))
        return state

    def evaluate(self, state: TrainState, step: int) -> None:
        found = self.job.evaluate(state)
        if not finite(found):
            raise Diverged(
                f"After step {step} the held-out loss is {found['loss']}: {self.files.kept()}; "
                "lower the learning rate, clip gradients (clip=1.0) or warm up longer."
            )
        self.files.append(step=step, heldout=found)

    def look(self) -> None:
        """At the metrics of the step before, which are there by now."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        means = numbers(metrics.means)
        if int(metrics.bad) >= 0 or not finite(means):
            self._stop(step, metrics, means)
        if self.job.pace.due(self.job.pace.log_every, step):
            schedule = self.job.schedule
            scale = {} if schedule is None else {"schedule": float(schedule(step - 1))}
            norm = float(metrics.gradient_norm)
            self.files.append(step=step, train=means, gradient_norm=norm, **scale)
            self._time(step)
        self.tell(f"loss {means['loss']:.4f}")

    def _time(self, step: int) -> None:
        now = time.perf_counter()
        if self.since:  # the first interval compiles
            batch, targets = self.job.order.batch, self.job.examples.train.targets
            steps, seconds = step - self.since, now - self.clock
            positions = steps * batch * int(np.prod(targets.shape[1:]))
            floor = self.job.floor
            used = {} if floor is None else {"utilization": steps * floor / seconds}
            self.files.note("speed", step=step, positions_per_second=positions / seconds, **used)
        self.clock, self.since = now, step

    def _stop(self, step: int, metrics: Metrics, means: Mapping[str, float]) -> None:
        bad = int(metrics.bad)
        where = f", first in the gradient of {self.names[bad]}" if bad >= 0 else ""
        raise Diverged(
            f"The loss at step {step} is {means['loss']}{where}, and not every number is finite: "
            f"{self.files.kept()}; lower the learning rate, clip gradients (clip=1.0) or warm up "
            "longer."
        )
