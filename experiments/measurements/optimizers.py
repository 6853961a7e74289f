"""Optimizers at one tuning budget: each gets the same number of learning rates to choose from.

All learning rates of an optimizer's YAML are multiplied by each factor in turn and tried with one
seed, which is then out of the race; the factor with the least final loss runs with the others, from
which all numbers come. Runs are ordinary ones: what was done before is given back, so that a race
goes on where it was cut, and takes in another optimizer at its own cost alone.
"""

import math
from collections.abc import Sequence
from typing import Any

from experiments import memory, progress, train
from experiments.papers.lookup import Run, compose
from experiments.training.loop import Diverged


def optimizers(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each optimizer: what was tried, and the finals with their curves."""
    race = plain["race"]
    rows, each = [], len(race["factors"]) + len(race["seeds"])
    with progress.steps("race", each * len(race["optimizers"])) as tell:

        def final(name: str, factor: float, seed: int) -> dict[str, Any]:
            found = _run(race["settings"], name, factor, seed, plain["runs"])
            tell(f"{name} × {factor}, seed {seed}: {found['loss']:.4f}")
            return found

        for name in race["optimizers"]:
            tried = {f: final(name, f, race["tuning_seed"]) for f in race["factors"]}
            best = min(tried, key=lambda f: tried[f]["loss"])
            rows.append(
                {
                    "optimizer": name,
                    "tried": [[f, found["loss"]] for f, found in tried.items()],
                    "factor": best,
                    "inside": best not in (min(tried), max(tried)),
                    "finals": [final(name, best, seed) for seed in race["seeds"]],
                }
            )
    return rows


def _run(settings: Sequence[str], name: str, factor: float, seed: int, runs: str) -> dict[str, Any]:
    overrides = [*settings, f"optimizer={name}", f"learning_rates={factor}", f"seed={seed}"]
    config = compose(Run("train", (*overrides, f"runs={runs}", "logger.tensorboard=false")))
    try:
        record = train.one(config).record
    except Diverged as error:
        return {"seed": seed, "loss": math.inf, "curve": [], "failed": str(error)}
    finally:
        memory.drop_programs()  # every run compiles its own step
    found = record["training"]
    return {
        "seed": seed,
        "loss": found["heldout"]["loss"],
        "curve": found["curve"],
        "seconds": record["seconds"]["train"] - record["seconds"]["train_compile"],
        "identity": record["identity"],
    }
