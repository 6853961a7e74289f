"""A rotation learned on the whole model, in memory: SpinQuant (papers/spinquant.md).

The loss is the model's own on calibration text, with every layer's input rounded as it will be and
its weights as they are. Turning an input, rounding it and turning it back is the same as turning
the whole model, and cheaper: no weight is turned while R is sought.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from algorithms.formats import Format, integer
from algorithms.quantization.spinquant import cayley_sgd, learn_rotation
from experiments.checkpoints.loading import load_blocks, load_stem, load_tail
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from experiments.progress import console
from kernels.hadamard import hadamard
from models.block import Block, Flow
from models.sites import Site

PER_TOKEN = integer(bits=4, group_size=None, symmetric=True, scale_dtype="float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """How long, how fast, and for which rounding of activations R is learned."""

    format: Format = PER_TOKEN
    steps: int = 50
    tokens: int = 256  # of one window, in each step
    learning_rate: float = 1.5  # falls to zero along a cosine
    momentum: float = 0.0
    range_gradient: bool = False  # true: the gradient knows that a wider range rounds worse

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens < 2:
            raise ValueError(
                f"steps={self.steps} must be positive and tokens={self.tokens} at least 2."
            )
        if self.format.needs_data:
            raise ValueError(
                f"search={self.format.search} is for weights: activations have search=null."
            )
        self.optimizer()  # or ValueError

    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.cosine_decay_schedule(self.learning_rate, self.steps)
        return cayley_sgd(rate, momentum=self.momentum)


def learn(
    source: Source,
    start: Float[Array, "D D"],
    windows: Int[np.ndarray, "n T"],
    learning: Learning,
    *,
    online: Sequence[str],
    seed: int,
) -> Float[Array, "D D"]:
    """R, from `start` on, for a source whose norms have no scales.

    windows: calibration tokens, drawn from by `seed`. online: layers that turn their own input.
    Raises UserError if the loss is not finite.
    """
    loss, model = quantized_loss(source, learning, online)
    batches = jnp.asarray(draw(windows, learning, seed))
    r, found = learn_rotation(loss, start, model, batches, learning.optimizer())
    losses = np.asarray(found)
    if not np.isfinite(losses).all():
        raise UserError(
            "Learning the rotation gave a loss that is not finite: the model is damaged, or "
            f"learning_rate={learning.learning_rate} is too large."
        )
    few = max(1, len(losses) // 5)
    console.print(
        f"rotation learned in {len(losses)} steps: loss {losses[:few].mean():.3f} at first, "
        f"{losses[-few:].mean():.3f} at last"
    )
    return r


def draw(windows: Int[np.ndarray, "n T"], learning: Learning, seed: int) -> Int[np.ndarray, "s t"]:
    """The tokens of each step: the beginnings of windows, in random order, again and again."""
    rng, rounds = np.random.default_rng(seed), -(-learning.steps // len(windows))
    order = np.concatenate([rng.permutation(len(windows)) for _ in range(rounds)])
    return windows[order[: learning.steps], : learning.tokens]


def quantized_loss(
    source: Source, learning: Learning, online: Sequence[str]
) -> tuple[Callable[..., Float[Array, ""]], Any]:
    """loss(R, model, tokens), and the model it takes: blocks of one kind stacked, to be scanned."""
    ends_graph, ends = nnx.split(nnx.List([load_stem(source), load_tail(source)]))
    blocks = [nnx.split(block) for block in load_blocks(source) if block.sites]  # else the identity
    runs = [(graph, [state for _, state in run])
            for graph, run in itertools.groupby(blocks, key=lambda block: block[0])]  # fmt: skip
    graphs = tuple(graph for graph, _ in runs)
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) for _, states in runs]
    round_ = functools.partial(_rounded, learning=learning)

    def loss(r, model, tokens: Int[Array, " T"]) -> Float[Array, ""]:
        ends, stacked = model
        both: Any = nnx.merge(ends_graph, ends)
        stem, tail = both
        x = stem(tokens[None], jnp.arange(tokens.size)[None])
        for graph, states in zip(graphs, stacked, strict=True):

            @jax.checkpoint
            def run(x, state, graph=graph):
                block = nnx.merge(graph, state)
                return _through(block, x, lambda site, a: _turned(site, a, r, round_, online)), None

            x, _ = lax.scan(run, x, states)
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            tail(x[0, :-1], stem.embed), tokens[1:]
        ).mean()

    return loss, (ends, stacked)


def _through(block: Block, x: Float[Array, "B T D"], change: Callable[[Site, Array], Array]):
    """A block's output where every site's activation is changed before it is read."""
    flow = Flow(x, x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    *stages, last = block.stages()
    for stage, site in zip(stages, block.sites, strict=True):
        flow = stage(flow)
        flow = flow._replace(activation=change(site, flow.activation))
    return last(flow).residual


def _turned(site: Site, x, r, round_, online: Sequence[str]):
    """The activation, turned as its readers will see it, rounded, turned back."""
    if site.producer.endswith("norm"):
        turned = jnp.matmul(x, r, precision="highest")
        return jnp.matmul(round_(turned), r.T, precision="highest")
    if set(site.readers) & set(online):
        return hadamard(round_(hadamard(x)), inverse=True)
    return round_(x)


def _rounded(x: Float[Array, "B T i"], learning: Learning) -> Float[Array, "B T i"]:
    """Rounded token by token. The gradient passes as if it were not, but that the error is so many
    parts of a step, and the step what the token's range makes it.
    """
    rows, format = x.reshape(-1, x.shape[-1]), learning.format
    error = lax.stop_gradient(format.nearest(rows) - rows)
    if learning.range_gradient:
        step = format.columns_of(format.fit(rows), rows).scale
        fixed = lax.stop_gradient(step)
        error = error + error / fixed * (step - fixed)  # in value, nothing
    return x + error.reshape(x.shape)
