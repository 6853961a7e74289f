"""The coordinate check: how activations grow with the width, in muP and without it.

At each width a fresh model is trained for a few steps on one batch, at one learning rate for all,
and the mean magnitudes of the outputs of its blocks and of its logits are fitted by a power of the
width. In the standard parametrization weights have a deviation of 1 / √width.
"""

from typing import Any

import jax
import numpy as np

from algorithms.mup import coordinate_check, slopes
from experiments import progress
from experiments.papers.lookup import Run, compose
from experiments.training.loop import Job
from experiments.training.planning import plan


def widths(plain: dict[str, Any]) -> dict[str, Any]:
    """Of both parametrizations: sizes at each width, the mean over seeds, and their powers."""
    settings = plain["widths"]
    found = {}
    with progress.steps("widths", 2 * len(settings["seeds"]) * len(settings["widths"])) as tell:
        for name, of_width in (("standard", _standard), ("muP", _mup)):
            each = []
            for seed in settings["seeds"]:
                sizes: dict[int, dict[str, float]] = {}
                for width in settings["widths"]:
                    grown = (*settings["run"], *of_width(width, **settings["base"]), f"seed={seed}")
                    sizes |= _sizes(width, grown, settings["steps"])
                    tell(f"{name}, {width} wide")
                each.append(sizes)
            found[name] = _summary(each)
    return {"steps": settings["steps"], "widths": settings["widths"], "parametrizations": found}


def _standard(width: int, hidden: int, head_size: int) -> tuple[str, ...]:
    return ("optimizer=adamw", f"model.deviation={width**-0.5}", *_shape(width, hidden, head_size))


def _mup(width: int, hidden: int, head_size: int) -> tuple[str, ...]:
    return (
        "optimizer=mup_adamw", f"optimizer.growth={width / hidden}",
        f"model.deviation={hidden**-0.5}",
        f"+model.mup={{hidden:{hidden},head_size:{head_size}}}", *_shape(width, hidden, head_size),
    )  # fmt: skip


def _shape(width: int, hidden: int, head_size: int) -> tuple[str, ...]:
    """As many heads as the base has, wider ones; four times the width within the MLP."""
    return (f"model.hidden={width}", f"model.head_size={head_size * width // hidden}",
            f"model.feed_forward={4 * width}")  # fmt: skip


def _sizes(width: int, overrides: tuple[str, ...], steps: int) -> dict[int, dict[str, float]]:
    job: Job = plan(compose(Run("train", (*overrides, "logger.tensorboard=false")))).job()
    model = job.parts.merged(job.parts.params, job.parts.buffers)
    return coordinate_check(
        {width: model}, lambda _: job.optimizer, job.order.draw(job.examples.train, 0),
        job.objective, jax.random.key(job.seed), steps=steps,
    )  # fmt: skip


def _summary(each: list[dict[int, dict[str, float]]]) -> dict[str, Any]:
    names = next(iter(each[0].values()))
    powers = [slopes(sizes) for sizes in each]
    return {
        name: {
            "sizes": [float(np.mean([s[width][name] for s in each])) for width in each[0]],
            "powers": [power[name] for power in powers],
        }
        for name in names
    }
