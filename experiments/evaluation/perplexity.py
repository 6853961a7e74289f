"""Perplexity by protocol E, streamed block by block, so that a model need not fit in memory.

Each window stands on its own, without bos; the loss runs over its positions 1 … T - 1; perplexity
is exp(total loss / total positions). All windows have one length, so that is exp of the mean over
windows of each one's mean loss, whose standard error is over windows.
"""

import math
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments import progress
from experiments.checkpoints.sources import Source, require_predictions
from experiments.data.windows import Windows, digest
from experiments.evaluation import logits
from experiments.evaluation.forward import activations, in_chunks

LARGEST = math.log(sys.float_info.max)


class Perplexity(NamedTuple):
    """Mean next-token loss of each window, in nats."""

    losses: Float[np.ndarray, " n"]

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def loss_error(self) -> float:
        """Standard error of the mean over windows."""
        n = len(self.losses)
        return float(self.losses.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

    @property
    def value(self) -> float:
        """Infinite where a float does not hold it: of a model that training ruined."""
        return math.exp(self.loss) if self.loss < LARGEST else math.inf

    @property
    def error(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.value * self.loss_error


def evaluate(source: Source, windows: Windows, *, chunk: int = 2) -> dict[str, Any]:
    """Perplexity on the held-out windows as a record keeps it: what conf/evaluation names."""
    found = perplexity(source, windows.heldout, chunk=chunk)
    return {
        "perplexity": {
            "value": found.value,
            "standard_error": found.error,
            "loss": found.loss,
            "loss_standard_error": found.loss_error,
            "window_losses": found.losses.tolist(),
            "windows": list(windows.heldout.shape),
            "data": {"name": windows.name, "digest": digest(windows.heldout)},
        }
    }


def perplexity(source: Source, windows: Int[np.ndarray, "n T"], *, chunk: int = 2) -> Perplexity:
    """Evaluate a model on held-out windows, `chunk` of them at a time."""
    require_predictions(source.config, "perplexity")
    batches = in_chunks(windows, chunk)
    with progress.steps("evaluate", source.config.layers + 1) as step:
        found = activations(source, batches, step=step)
        states = [x[:, :-1].reshape(-1, x.shape[-1]) for x in found]
        tokens = [jnp.asarray(batch[:, 1:].ravel()) for batch in batches]
        seen = logits.following(source, states, tokens)
        losses = [each.loss.reshape(-1, windows.shape[1] - 1).mean(1) for each in seen]
        result = Perplexity(np.concatenate([np.asarray(loss, np.float64) for loss in losses]))
        step("")
    return result
