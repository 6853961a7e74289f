"""What a model is trained on: arrays, and the order in which batches are drawn from them.

A batch is a function of the seed and the step alone, so that the position of the data is the number
of steps done: what resumes goes on with the very batches of what was never interrupted.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from algorithms.training import Batch
from experiments.data.windows import Windows
from experiments.errors import UserError


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs and targets, to train on and to evaluate by."""

    train: Batch  # of NumPy arrays
    heldout: Batch
    name: str
    digest: str

    def __post_init__(self) -> None:
        for part in (self.train, self.heldout):
            assert len(part.inputs) == len(part.targets)

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "digest": self.digest,
            "calibration": list(self.train.targets.shape),
            "heldout": list(self.heldout.targets.shape),
            "tokens": int(self.train.targets.size + self.heldout.targets.size),
        }


def next_tokens(windows: Windows) -> Examples:
    """Windows of text as examples: each token but the first is predicted from those before it."""

    def shifted(tokens: Int[np.ndarray, "n T"]) -> Batch:
        return Batch(tokens[:, :-1], tokens[:, 1:])

    return Examples(
        shifted(windows.calibration), shifted(windows.heldout), windows.name, windows.digest
    )


@dataclasses.dataclass(frozen=True)
class Order:
    """Passes over n examples, each in a new order, in batches; what does not fill a batch at the
    end of a pass is left out of it.
    """

    examples: int
    batch: int
    seed: int
    passes: int | None = None  # over the data at most; None: as many as the steps take

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.examples:
            raise UserError(
                f"batch={self.batch} must be from 1 to the {self.examples} examples that there "
                "are: choose a smaller batch or more data (data.calibration=null takes all)."
            )

    def require(self, steps: int) -> None:
        """Raise UserError if the data are exhausted before the last step."""
        available = (self.passes or 0) * (self.examples // self.batch)
        if self.passes is not None and steps > available:
            raise UserError(
                f"steps={steps} of batch={self.batch} need more than passes={self.passes} over "
                f"{self.examples} examples, which give {available}: train for fewer steps, allow "
                "more passes (passes=null: any number), or choose more data."
            )

    def indices(self, step: int) -> Int[np.ndarray, " b"]:
        """Of the examples of one step's batch."""
        each = self.examples // self.batch
        number, place = divmod(step, each)
        order = _permutation(self.examples, self.seed, number)
        return order[place * self.batch : (place + 1) * self.batch]

    def draw(self, data: Batch, step: int) -> Batch:
        chosen = self.indices(step)
        return jax.tree.map(lambda x: np.asarray(x)[chosen], data)


@functools.lru_cache(maxsize=1)
def _permutation(n: int, seed: int, number: int) -> Int[np.ndarray, " n"]:
    """Of one pass."""
    return np.random.default_rng([seed, number]).permutation(n)


def chunks(data: Batch, size: int) -> list[Batch]:
    """In order; the last one is shorter."""
    starts = range(0, len(data.inputs), size)
    return [jax.tree.map(lambda x: x[n : n + size], data) for n in starts]  # noqa: B023
