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
from algorithms.tensors import CompressedTensor, ExpertsTensor
from algorithms.walk import Block, NotFiniteError

Parameters = Any  # a pytree of arrays, each method's own, for one weight


class BlockwiseMethod(NamedTuple):
    """A learned method: what is learned for each weight, and how.

    `init(w[o, i])` gives a weight's parameters; `approximate(w, parameters)` the weight that the
    block computes with, differentiable in them; `finish(w, parameters)` the compressed weight,
    whose dense form is `approximate`'s. The optimizer takes `steps` steps on `batch` windows each,
    and after each `project` brings parameters back to where they may be. The last parameters are
    kept, or with `keep_best` those of the step with the least loss, divided by what `init`'s lose
    on the same windows: losses of different windows cannot be compared.
    """

    init: Callable[[Float[Array, "o i"]], Parameters]
    approximate: Callable[[Float[Array, "o i"], Parameters], Float[Array, "o i"]]
    finish: Callable[[Float[Array, "o i"], Parameters], CompressedTensor]
    optimizer: optax.GradientTransformation
    steps: int
    batch: int
    keep_best: bool = True
    project: Callable[[Parameters], Parameters] | None = None

    @property
    def observe(self) -> None:
        """As a `LayerwiseMethod` says that it looks at no site by itself."""

    @property
    def seeded(self) -> bool:
        """`compress` takes no key."""
        return False

    @property
    def row_block(self) -> int:
        """Rows of a weight are independent."""
        return 1

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
    context = _Context(state, weights, inputs[0].positions[:1])
    static = dict(graph=graph, methods=tuple(methods.values()), paths=tuple(methods))
    start = {path: _each(m.init, weights[path])(weights[path]) for path, m in methods.items()}
    first = _errors(context, start, x, y, **static)
    parameters, losses = _learn(context, start, x, y, first, key, **static)
    last = _errors(context, parameters, x, y, **static)
    loss = BlockLoss(*(float(relative_error(jnp.sum(e), jnp.sum(y**2))) for e in (first, last)))
    _require_finite(loss, losses, tuple(methods))
    tensors = {
        path: _finish(weights[path], parameters[path], finish=m.finish)
        for path, m in methods.items()
    }
    return tensors, loss


class _Context(NamedTuple):
    """What the loss depends on beside the parameters."""

    state: Any  # the block's arrays
    weights: dict[str, Float[Array, "o i"]]  # by module path
    positions: Int[Array, "1 T"]  # of every window


def _require_one_schedule(methods: Mapping[str, BlockwiseMethod]) -> None:
    for name in ("steps", "batch", "keep_best"):
        found = {getattr(method, name) for method in methods.values()}
        if len(found) > 1:
            raise ValueError(
                f"{name} must be the same for all layers of a block, which are learned together, "
                f"and is {' and '.join(map(str, sorted(found)))}."
            )


def _require_finite(loss: BlockLoss, losses: Float[Array, " s"], paths: Sequence[str]) -> None:
    """One number suffices to find out: where it came from is looked up only then."""
    if all(math.isfinite(x) for x in (*loss, float(jnp.sum(losses)))):
        return
    what = f"Learning {', '.join(paths)}"
    if not math.isfinite(loss.first):
        raise NotFiniteError(
            f"{what} began with a loss of {loss.first}: the activations hold NaN or infinity, or "
            "overflow float32 when squared. Look at the blocks before it, or at the calibration "
            "text."
        )
    step = int(jnp.argmin(jnp.isfinite(losses)))
    raise NotFiniteError(
        f"{what} gave a loss of {losses[step]} at step {step} of {len(losses)}: the learning rate "
        "is too high. Lower it."
    )


@functools.partial(jax.jit, static_argnames="finish")
def _finish(w, parameters, *, finish):
    tensor = _each(finish, w)(w, parameters)
    return ExpertsTensor(tensor) if w.ndim == 3 else tensor


def _each(function: Callable[..., Any], w: Float[Array, "*e o i"]) -> Callable[..., Any]:
    """For every expert, where a weight has some."""
    return jax.vmap(function) if w.ndim == 3 else function


def _output(context: _Context, parameters, x, *, graph, methods, paths):
    """The block's output with its weights as the methods approximate them."""
    block = nnx.merge(graph, context.state, copy=True)  # variables of this trace level, to be set
    for path, m in zip(paths, methods, strict=True):
        w = context.weights[path]
        approximation = _each(m.approximate, w)(w, parameters[path])
        surgery.set_weight(surgery.linear_at(block, path), approximation)
    return block(x, jnp.broadcast_to(context.positions, x.shape[:2]))[0]


_STATIC = ("graph", "methods", "paths")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _errors(context, parameters, x, y, **static) -> Float[Array, " n"]:
    """The squared error of each window's output."""

    def error(pair):
        return jnp.sum((_output(context, parameters, pair[0][None], **static) - pair[1]) ** 2)

    return jax.lax.map(error, (x, y))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _learn(context, start, x, y, first: Float[Array, " n"], key, **static):
    """The parameters after the descent, and the loss of each step on its own windows.

    x, y: [windows, T, D]; first: the squared error of each window at the start.
    """
    learned = dict(zip(static["paths"], static["methods"], strict=True))
    steps, batch, keep_best = next((m.steps, m.batch, m.keep_best) for m in learned.values())
    scale = 1 / jnp.maximum(jnp.mean(y**2), jnp.finfo(y.dtype).tiny)

    def loss(parameters, pick):
        error = jnp.mean((_output(context, parameters, x[pick], **static) - y[pick]) ** 2)
        score = error * x[pick].size / jnp.sum(first[pick])  # NaN, so no better, where none is lost
        return error * scale, score

    def step(carry, pick):
        parameters, states, best = carry
        (value, score), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, pick)
        if keep_best:
            best = jax.lax.cond(score < best[0], lambda: (score, parameters), lambda: best)
        moved = {
            path: _update(m, gradient[path], states[path], parameters[path])
            for path, m in learned.items()
        }
        parameters, states = ({path: pair[n] for path, pair in moved.items()} for n in (0, 1))
        return (parameters, states, best), value

    states = {path: m.optimizer.init(start[path]) for path, m in learned.items()}
    best: Any = (jnp.array(jnp.inf, y.dtype), start) if keep_best else None
    picks = _batches(key, len(x), steps, batch)
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
