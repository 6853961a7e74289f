"""The spectrum of the Hessian of a model's loss while it is trained, and how it looks.

At some steps of a run of `experiments.train`, whose settings are `spectrum.run`, the eigenvalues of
the Hessian of the mean loss over one batch of examples, in all parameters: by stochastic Lanczos
quadrature (`algorithms.linalg.spectrum`), of which the record has nodes and weights.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from algorithms import training
from algorithms.linalg import density, hessian_product
from algorithms.linalg import spectrum as quadratures
from algorithms.linalg.stochastic import Spectrum
from experiments import progress
from experiments.papers.lookup import Run, compose
from experiments.plots import save
from experiments.training.loop import Job
from experiments.training.planning import plan

BULK = 0.01  # of the largest magnitude of an eigenvalue, within which the bulk of them lies
Row = Mapping[str, Any]  # of `spectra`


def spectra(plain: dict[str, Any]) -> dict[str, Any]:
    """A row for each step asked for: the loss, nodes and weights of each probe."""
    settings = plain["spectrum"]
    overrides = (*settings["run"], f"batch={settings['examples']}", "logger.tensorboard=false")
    job: Job = plan(compose(Run("train", overrides))).job()
    batch = job.order.draw(job.examples.train, 0)
    state, rows = job.begin(), []
    with progress.steps("spectrum", len(settings["steps"])) as tell:
        for step in range(max(settings["steps"]) + 1):
            if step in settings["steps"]:
                rows.append({"step": step, **_spectrum(job, state, batch, settings)})
                tell(f"step {step}")
            state, _ = job.step(state, job.order.draw(job.examples.train, step))
    return {"parameters": sum(x.size for x in jax.tree.leaves(state.params)), "rows": rows}


def _spectrum(job: Job, state: Any, batch: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    loss, found = _measured(
        state.params, state.buffers, batch, job.fixed, job.taught, graph=job.parts.graph,
        teacher_graph=job.teacher_graph, objective=job.objective, dtype=job.dtype,
        probes=settings["probes"], steps=settings["lanczos"],
    )  # fmt: skip
    return {"loss": float(loss), "nodes": found.nodes.tolist(), "weights": found.weights.tolist()}


@functools.partial(
    jax.jit, static_argnames=("graph", "teacher_graph", "objective", "dtype", "probes", "steps")
)
def _measured(
    params: Any, buffers: Any, batch: Any, fixed: Any, taught: Any, *, graph: Any,
    teacher_graph: Any, objective: Any, dtype: Any, probes: int, steps: int,
) -> tuple[jax.Array, Spectrum]:  # fmt: skip
    key = jax.random.key(0)

    def loss(params: Any) -> jax.Array:
        found, _ = training.sums(
            params, buffers, batch, key, fixed=fixed, teacher=taught, graph=graph,
            teacher_graph=teacher_graph, objective=objective, dtype=dtype, training=False,
        )  # fmt: skip
        return found.loss / found.positions

    product = hessian_product(loss, params)
    return loss(params), quadratures(key, product, params, probes=probes, steps=steps)


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """The outermost nodes of all probes, and the mean share of eigenvalues in parts of the axis."""
    head = ["step", "loss", "least", "largest", "below the bulk"]
    head += [f"within {BULK:.0%} of the largest", "above"]
    return [head, *map(_cells, found["rows"])]


def _cells(row: Row) -> list[str]:
    nodes, weights = np.array(row["nodes"]), np.array(row["weights"])
    edge = BULK * np.abs(nodes).max()
    parts = (nodes < -edge, np.abs(nodes) <= edge, nodes > edge)
    shares = [np.sum(weights * part) / len(weights) for part in parts]
    outer = [f"{nodes.min():.3g}", f"{nodes.max():.3g}"]
    return [str(row["step"]), f"{row['loss']:.3f}", *outer, *(f"{s:.2%}" for s in shares)]


def digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()


def picture(rows: Sequence[Row], path: Path) -> Path:
    """Densities on a logarithmic axis, each node widened by a hundredth of all nodes' range."""
    every = np.concatenate([np.ravel(row["nodes"]) for row in rows])
    width = (every.max() - every.min()) / 100
    grid = np.linspace(every.min() - 4 * width, every.max() + 4 * width, 600)
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            rule = Spectrum(jnp.array(row["nodes"]), jnp.array(row["weights"]))
            shown = np.asarray(density(rule, jnp.asarray(grid, jnp.float32), width))
            axes.semilogy(grid, shown, label=f"step {row['step']}, loss {row['loss']:.2f}")
        axes.set(xlabel="eigenvalue of the loss's Hessian", ylabel="density", ylim=(1e-7, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        return save(figure, path, digest(rows))
