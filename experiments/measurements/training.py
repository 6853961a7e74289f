"""What training costs beside the arithmetic: the trainer over a bare jitted step, each optimizer
per parameter, memory as the compiler lays it out, and how often a run compiles.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from algorithms import training
from experiments import memory
from experiments.entry import resolved
from experiments.papers.lookup import Run, compose
from experiments.runs import run as runs
from experiments.training import loop
from experiments.training.building import build_optimizer
from experiments.training.planning import plan

WIDTH, DEPTH = 512, 4  # of the parameters that optimizers are timed on
TIMED = 8  # updates in each turn


def trainer(plain: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The trainer's steps and bare ones, in turns; and what one run compiles."""
    settings = plain["trainer"]
    config = compose(Run("train", (*settings["run"], f"runs={folder}", "logger.tensorboard=false")))
    planned = plan(config)
    job = planned.job()
    bare, trained, programs = [], [], training.step._cache_size()
    for turn in range(settings["turns"] + 1):  # the first one compiles
        with memory.kept_whole():
            bare.append(_bare(job))
        at = runs.Place("train", resolved(config), f"costs-{turn}",
                        folder / f"turn-{turn}")  # fmt: skip
        with runs.begin(at) as run:
            loop.train(job, run)
        speeds = [e["positions_per_second"] for e in run.journal.entries("speed")]
        trained.append(statistics.median(speeds))
    ratios = [b / t - 1 for b, t in zip(bare[1:], trained[1:], strict=True)]
    return {
        "bare_positions_per_second": bare[1:],
        "trainer_positions_per_second": trained[1:],
        "overhead": statistics.median(ratios),
        "compilations": training.step._cache_size() - programs,
        "memory": _memory(job),
        "estimated_memory": planned.estimate.memory["train"],
    }


def _bare(job: loop.Job) -> float:
    """Positions per second of the jitted step alone."""
    state, batches = job.begin(), [job.order.draw(job.examples.train, n) for n in range(TIMED)]
    state, _ = job.step(state, batches[0])
    jax.block_until_ready(state)
    count, start = job.pace.steps - 1, time.perf_counter()
    for n in range(count):
        state, _ = job.step(state, batches[n % TIMED])
    jax.block_until_ready(state)
    positions = count * int(np.prod(batches[0].targets.shape))
    return positions / (time.perf_counter() - start)


def _memory(job: loop.Job) -> dict[str, int]:
    """Bytes of one step, as the compiler lays them out."""
    lowered = training.step.lower(
        job.begin(), job.fixed, job.taught, job.order.draw(job.examples.train, 0),
        graph=job.parts.graph, teacher_graph=job.teacher_graph, objective=job.objective,
        optimizer=job.optimizer, accumulate=job.accumulate, dtype=job.dtype,
        layout=job.state_layout,
    )  # fmt: skip
    found: Any = lowered.compile().memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes,
        "shared": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def optimizer_costs(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each, one update of the same parameters: time over AdamW's, bytes of state."""
    settings = plain["optimizer_costs"]
    params = {
        "blocks": [{"kernel": jnp.ones((WIDTH, WIDTH)) / WIDTH} for _ in range(DEPTH)],
        "embed": jnp.ones((WIDTH, WIDTH)) / WIDTH,
    }
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    count = sum(x.size for x in jax.tree.leaves(params))
    rows = []
    baseline = _Timed("adamw", params, gradients)
    for name in settings["optimizers"]:
        timed = baseline if name == "adamw" else _Timed(name, params, gradients)
        pairs = [(timed.turn(), baseline.turn()) for _ in range(settings["turns"])]
        rows.append(
            {
                "optimizer": name,
                "nanoseconds_per_parameter": 1e9 * statistics.median(a for a, _ in pairs) / count,
                "times_adamw": statistics.median(a / b for a, b in pairs),
                "state_bytes_per_parameter": timed.state_bytes / count,
                "temporaries_per_parameter": timed.temporaries / count,
            }
        )
    return rows


class _Timed:
    """An optimizer's update, compiled; `turn` gives the seconds of one, the mean over several."""

    def __init__(self, name: str, params: Any, gradients: Any):
        optimizer = build_optimizer(compose(Run("train", (f"optimizer={name}",))))
        self.state = jax.jit(optimizer.init)(params)
        self.params, self.gradients = params, gradients
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        self.update = self._compiled(optimizer)
        found = self.update.memory_analysis()
        self.temporaries = 0 if found is None else found.temp_size_in_bytes
        self.turn()

    def _compiled(self, optimizer: optax.GradientTransformationExtraArgs) -> Any:
        def update(gradients: Any, state: Any, params: Any) -> Any:
            loss = jnp.zeros(())
            updates, state = optimizer.update(
                gradients, state, params, value=loss, loss=loss, grad=gradients,
                value_fn=lambda p: loss, obj_fn=lambda p: loss, grad_fn=lambda p, *_: gradients,
            )  # fmt: skip
            return optax.apply_updates(params, updates), state

        return jax.jit(update).lower(self.gradients, self.state, self.params).compile()

    def turn(self) -> float:
        start = time.perf_counter()
        for _ in range(TIMED):
            self.params, self.state = self.update(self.gradients, self.state, self.params)
        jax.block_until_ready(self.params)
        return (time.perf_counter() - start) / TIMED
