"""How well a sentence encoder finds what belongs together: what conf/evaluation/similarity names.

Each held-out window is cut in two, and each half embedded: its last activations between the model's
own first and last special tokens, averaged over tokens, at length one. For every first half its own
second half is looked for among those of all windows. The loss is that of a softmax over cosines /
0.05, as such encoders are trained (van den Oord et al., 2018, arXiv:1807.03748); it has one value
for each window, so that methods are compared in pairs.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments import progress
from experiments.checkpoints.sources import Source
from experiments.data.tokenizer import Tokenizer
from experiments.data.windows import Windows, digest
from experiments.errors import UserError
from experiments.evaluation.forward import activations, in_chunks

TEMPERATURE = 0.05


class Retrieval(NamedTuple):
    """Of each window: the loss in nats, and how many second halves are nearer than its own."""

    losses: Float[np.ndarray, " n"]
    before: Int[np.ndarray, " n"]

    @property
    def accuracy(self) -> float:
        """The share of windows whose own second half is the nearest."""
        return float((self.before == 0).mean())

    @property
    def accuracy_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.before))

    @property
    def reciprocal_rank(self) -> float:
        return float((1 / (1 + self.before)).mean())


def evaluate(source: Source, windows: Windows, *, chunk: int = 8) -> dict[str, Any]:
    """Retrieval on the held-out windows as a record keeps it."""
    found = retrieval(source, windows.heldout, chunk=chunk)
    n = len(found.losses)
    error = float(found.losses.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return {
        "similarity": {
            "value": found.accuracy,
            "standard_error": found.accuracy_error,
            "reciprocal_rank": found.reciprocal_rank,
            "loss": float(found.losses.mean()),
            "loss_standard_error": error,
            "window_losses": found.losses.tolist(),
            "windows": list(windows.heldout.shape),
            "data": {"name": windows.name, "digest": digest(windows.heldout)},
        }
    }


def retrieval(source: Source, windows: Int[np.ndarray, "n T"], *, chunk: int = 8) -> Retrieval:
    """Embed both halves of each window and look each first one's second one up."""
    if len(windows) < 2 or windows.shape[1] < 2:
        raise UserError(
            f"evaluation=similarity looks halves of windows up among others, and has "
            f"{len(windows)} windows of {windows.shape[1]} tokens: ask for more (data.heldout)."
        )
    half = windows.shape[1] // 2
    pieces = np.concatenate([windows[:, :half], windows[:, half : 2 * half]])
    pieces = between_specials(pieces, source.tokenizer())
    with progress.steps("evaluate", source.config.layers) as step:
        found = activations(source, in_chunks(pieces, chunk), step=step)
    first, second = jnp.split(jnp.concatenate([pooled(x) for x in found]), 2)
    return Retrieval(*map(np.asarray, _compared(first, second)))


def between_specials(
    windows: Int[np.ndarray, "n T"], tokenizer: Tokenizer
) -> Int[np.ndarray, "n t"]:
    """Windows with the tokens in front and behind that the model's texts have."""
    if tokenizer.bos is None or tokenizer.eos is None or not tokenizer.add_bos:
        return windows
    ends = np.full((len(windows), 1), 1, windows.dtype)
    return np.concatenate([ends * tokenizer.bos, windows, ends * tokenizer.eos], 1)


@jax.jit
def pooled(x: Float[Array, "n T D"]) -> Float[Array, "n D"]:
    """The mean over tokens, at length one."""
    mean = x.astype(jnp.float32).mean(1)
    return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)


@jax.jit
def _compared(first: Float[Array, "n D"], second: Float[Array, "n D"]):
    cosines = jnp.matmul(first, second.T, precision="highest")
    own = jnp.diag(cosines)
    losses = jax.nn.logsumexp(cosines / TEMPERATURE, axis=1) - own / TEMPERATURE
    return losses, (cosines > own[:, None]).sum(1)
