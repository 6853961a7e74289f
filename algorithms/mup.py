"""muP, the maximal update parametrization. Yang, Hu, Babuschkin, Sidor, Liu, Farhi, Ryder,
Pachocki, Chen, Gao, NeurIPS 2021, arXiv:2203.03466.

How a model wider than a base by a factor m is initialized and trained, so that every activation and
every change of one stays of the same size, and the best learning rate with it. In the form of the
paper's Table 8 and of the official code, microsoft/mup, relative to the base:

                          embeddings, biases, norms    matrices of the blocks    head
    deviation at first    1                            1 / √m                    1
    output                                                                       1 / m
    rate, Adam            1                            1 / m                     1
    rate, SGD             m                            1                         m

Scores of attention are (√d_0 / d) q kᵀ, d the size of a head and d_0 that of the base's. A tied
head is the embedding, with the head's multiplier. Decoupled weight decay belongs to the rate, and
so shrinks with it, unless it is added behind `scale_by_width`. Everett et al., arXiv:2407.05872,
compare these tables with others, under which other layers' rates carry the width.

This differs from the official code in: 1. the widths of a block, feed-forward and heads together,
are taken to grow by one factor, that of the hidden size, where it compares each parameter's shapes.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from algorithms import training
from algorithms.optimizers.groups import path_name
from algorithms.training import Batch, Objective

MATRICES = r"blocks\..*\.kernel"


class Multipliers(NamedTuple):
    """What a wider model's numbers are those of the base times; the scale of attention as it is."""

    deviation: float  # of the matrices of the blocks
    logits: float
    attention: float


def multipliers(growth: int | float, head_size: int, base_head_size: int) -> Multipliers:
    """growth: m. Raises ValueError unless it is positive."""
    _require_growth(growth)
    return Multipliers(growth**-0.5, 1 / growth, math.sqrt(base_head_size) / head_size)


def mup(
    inner: optax.GradientTransformation,
    *,
    growth: int | float,
    rule: str = "adam",
    matrices: str = MATRICES,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer tuned for the base, for a model wider by `growth`; as `scale_by_width`."""
    return optax.with_extra_args_support(
        optax.chain(inner, scale_by_width(growth, rule=rule, matrices=matrices))
    )


def scale_by_width(
    growth: int | float, *, rule: str = "adam", matrices: str = MATRICES
) -> optax.GradientTransformation:
    """Updates times the table's rates.

    growth: m. rule: "adam", of optimizers whose updates do not depend on the gradient's size, or
    "sgd". matrices: the regular expression that the paths of the blocks' matrices match. Raises
    ValueError for another rule or a growth that is not positive.
    """
    _require_growth(growth)
    if rule not in ("adam", "sgd"):
        raise ValueError(f"rule={rule!r} must be adam or sgd.")
    within, elsewhere = (1 / growth, 1.0) if rule == "adam" else (1.0, growth)

    def scaled(updates: Any, params: Any) -> Any:
        def one(path: Any, u: Any) -> Any:
            return u * (within if re.fullmatch(matrices, path_name(path)) else elsewhere)

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scaled)


def coordinate_check(
    models: Mapping[int, nnx.Module],
    optimizer: Callable[[int], optax.GradientTransformation],
    batch: Batch,
    objective: Objective,
    key: Key[Array, ""],
    *,
    steps: int = 4,
) -> dict[int, dict[str, float]]:
    """The mean magnitude of each block's output and of the logits, after some steps on one batch.

    models: by their width; optimizer: of a width. Under muP none depends on it.
    """
    return {
        width: _trained(model, optimizer(width), batch, objective, key, steps)
        for width, model in models.items()
    }


def slopes(sizes: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """By which power of the width each size grows: a line through the logarithms."""
    widths = np.log(np.array(list(sizes)))
    names = next(iter(sizes.values()))
    return {
        name: float(np.polyfit(widths, np.log([each[name] for each in sizes.values()]), 1)[0])
        for name in names
    }


def _trained(
    model: nnx.Module, optimizer: optax.GradientTransformation, batch: Batch,
    objective: Objective, key: Key[Array, ""], steps: int,
) -> dict[str, float]:  # fmt: skip
    parts = training.take_apart(model)
    state = jax.tree.map(jnp.copy, training.init(parts, optimizer, key))  # steps give it away
    for _ in range(steps):
        state, _ = training.step(
            state, parts.fixed, None, batch, graph=parts.graph, objective=objective,
            optimizer=optimizer,
        )  # fmt: skip
    return activation_sizes(parts.merged(state.params, state.buffers), batch.inputs)


def activation_sizes(model: Any, inputs: Any) -> dict[str, float]:
    """The mean magnitude of each block's output and of the logits."""
    found = model.predictions(jnp.asarray(inputs), features=range(len(model.blocks)))
    named = {f"blocks.{n}": x for n, x in enumerate(found.features)}
    return {name: _size(x) for name, x in {**named, "logits": found.logits}.items()}


def _size(x: Float[Array, "..."]) -> float:
    return float(jnp.mean(jnp.abs(x.astype(jnp.float32))))


def _require_growth(growth: int | float) -> None:
    if not growth > 0:
        raise ValueError(f"growth={growth} must be positive: a width over the base's.")
