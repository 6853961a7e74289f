"""Learned compression, one block at a time: the interface and the optimization.

All of a block's weights are approximated at once, so that the block's output on the activations
that compressed predecessors produce comes near what the original model gives. The optimization is
one scan over optax steps, compiled once per block shape.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from algorithms import surgery
from algorithms.numerics import relative_error
from algorithms.tensors import CompressedTensor
from algorithms.walk import Block, NotFiniteError

Parameters = Any  # a pytree of arrays, each method's own, for one weight


class BlockwiseMethod(NamedTuple):
    """A learned method: what is learned for each weight, and how.

    `init(w[o, i])` gives a weight's parameters; `approximate(w, parameters)` the weight that the
    block computes with, differentiable in them; `finish(w, parameters)` the compressed weight,
    whose dense form is `approximate`'s. The optimizer takes `steps` steps on `batch` windows each,
    and after each `project` brings parameters back to where they may be; the parameters with the
    least loss of those seen are kept if `keep_best`, else the last.
    """

    init: Callable[[Float[Array, "o i"]], Parameters]
    approximate: Callable[[Float[Array, "o i"], Parameters], Float[Array, "o i"]]
    finish: Callable[[Float[Array, "o i"], Parameters], CompressedTensor]
    optimizer: optax.GradientTransformation
    steps: int
    batch: int
    keep_best: bool = True
    project: Callable[[Parameters], Parameters] | None = None

    def compress(self, w: Float[Array, "o i"], stats: None = None) -> CompressedTensor:
        """Without any learning: what a weight's shape leads to."""
        return self.finish(w, self.init(w))


class BlockLoss(NamedTuple):
    """Relative squared error of the block's output on all windows, before and after."""

    first: float
    last: float


def learn_block(
    block: Block,
    inputs: Sequence[Any],
    targets: Sequence[Any],
    methods: Mapping[str, BlockwiseMethod],
    key: Key[Array, ""],
) -> tuple[dict[str, CompressedTensor], BlockLoss]:
    """Compress the layers that `methods` names, by module path; `block` is left as it is.

    inputs: chunks of activations at the block's input. targets: chunks as they leave the original
    block. key: draws the order of the windows. Each weight has its own method's optimizer; steps,
    batch and keep_best are the block's, so ValueError where methods differ in them. Raises
    NotFiniteError if a loss is not finite.
    """
    _require_one_schedule(methods)
    graph, state = nnx.split(block)
    weights = {path: surgery.get_weight(surgery.linear_at(block, path)) for path in methods}
    x = jnp.concatenate([flow.residual for flow in inputs])
    y = jnp.concatenate([flow.residual for flow in targets])
    found = _learn(
        graph, state, weights, x, y, inputs[0].positions[:1], key,
        methods=tuple(methods.values()), paths=tuple(methods),
    )  # fmt: skip
    _require_finite(found, tuple(methods))
    tensors = {
        path: _finish(weights[path], found.parameters[path], finish=m.finish)
        for path, m in methods.items()
    }
    return tensors, BlockLoss(float(found.first), float(found.last))


class _Learned(NamedTuple):
    parameters: dict[str, Parameters]  # by module path
    first: Float[Array, ""]
    last: Float[Array, ""]
    steps: Float[Array, " s"]  # the loss of each, on its own windows


def _require_one_schedule(methods: Mapping[str, BlockwiseMethod]) -> None:
    for name in ("steps", "batch", "keep_best"):
        found = {getattr(method, name) for method in methods.values()}
        if len(found) > 1:
            raise ValueError(
                f"{name} must be the same for all layers of a block, which are learned together, "
                f"and is {' and '.join(map(str, sorted(found)))}."
            )


def _require_finite(found: _Learned, paths: Sequence[str]) -> None:
    """One number suffices to find out: where it came from is looked up only then."""
    if all(map(math.isfinite, (found.first, found.last, jnp.sum(found.steps)))):
        return
    what = f"Learning {', '.join(paths)}"
    if not math.isfinite(found.first):
        raise NotFiniteError(
            f"{what} began with a loss of {found.first}: the activations hold NaN or infinity, or "
            "overflow float32 when squared. Look at the blocks before it, or at the calibration "
            "text."
        )
    step = int(jnp.argmin(jnp.isfinite(found.steps)))
    raise NotFiniteError(
        f"{what} gave a loss of {found.steps[step]} at step {step} of {len(found.steps)}: the "
        "learning rate is too high. Lower it."
    )


@functools.partial(jax.jit, static_argnames="finish")
def _finish(w, parameters, *, finish):
    return finish(w, parameters)


@functools.partial(jax.jit, static_argnames=("graph", "methods", "paths"))
def _learn(graph, state, weights, x, y, positions, key, *, methods, paths) -> _Learned:
    """x, y: [windows, T, D]; positions: [1, T], those of every window."""
    learned = dict(zip(paths, methods, strict=True))

    def output(dense, x):
        block = nnx.merge(graph, state, copy=True)  # variables of this trace level, to be set
        for path, w in dense.items():
            surgery.set_weight(surgery.linear_at(block, path), w)
        return block(x, jnp.broadcast_to(positions, x.shape[:2]))[0]

    def approximate(parameters):
        return {path: m.approximate(weights[path], parameters[path]) for path, m in learned.items()}

    def error(parameters):
        """On all windows, one at a time."""
        dense = approximate(parameters)
        squares = jax.lax.map(lambda pair: jnp.sum((output(dense, pair[0][None]) - pair[1]) ** 2),
                              (x, y))  # fmt: skip
        return relative_error(jnp.sum(squares), jnp.sum(y**2))

    scale = 1 / jnp.maximum(jnp.mean(y**2), jnp.finfo(y.dtype).tiny)

    def loss(parameters, pick):
        return jnp.mean((output(approximate(parameters), x[pick]) - y[pick]) ** 2) * scale

    start = {path: m.init(weights[path]) for path, m in learned.items()}
    last, losses = _descend(
        loss, start, _batches(key, len(x), methods[0].steps, methods[0].batch), learned
    )
    return _Learned(last, error(start), error(last), losses)


def _descend(loss, start, picks: Int[Array, "s b"], learned: Mapping[str, BlockwiseMethod]):
    """The parameters after one step per row of `picks`, or the best ones, and each step's loss."""
    keep_best = next(iter(learned.values())).keep_best

    def step(carry, pick):
        parameters, states, best = carry
        value, gradient = jax.value_and_grad(loss)(parameters, pick)
        if keep_best:
            best = jax.lax.cond(value < best[0], lambda: (value, parameters), lambda: best)
        moved = {
            path: _update(m, gradient[path], states[path], parameters[path])
            for path, m in learned.items()
        }
        parameters, states = ({path: pair[n] for path, pair in moved.items()} for n in (0, 1))
        return (parameters, states, best), value

    states = {path: m.optimizer.init(start[path]) for path, m in learned.items()}
    best = (
        (jnp.array(jnp.inf, jax.eval_shape(loss, start, picks[0]).dtype), start)
        if keep_best
        else None
    )
    (last, _, best), losses = jax.lax.scan(step, (start, states, best), picks)
    return (best[1] if keep_best else last), losses


def _update(method: BlockwiseMethod, gradient, state, parameters):
    updates, state = method.optimizer.update(gradient, state, parameters)
    parameters = optax.apply_updates(parameters, updates)
    return (parameters if method.project is None else method.project(parameters)), state


def _batches(key, count: int, steps: int, batch: int) -> Int[Array, "s b"]:
    """The windows of each step: passes over all of them, each in a new order; what does not fill a
    batch is left out of its pass.
    """
    batch = min(batch, count)
    each = count // batch
    keys = jax.random.split(key, -(-steps // each))
    orders = jax.vmap(lambda key: jax.random.permutation(key, count)[: each * batch])(keys)
    return orders.reshape(-1, batch)[:steps]
