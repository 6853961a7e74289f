"""One step of training as a pure function, for any model, objective and optimizer.

Of a model's variables, `Learned` ones are moved by the optimizer, `Buffer`s (statistics such as
running maxima) are whatever the forward or the backward pass leaves in them, and the rest is fixed:
it is an argument of the step and no part of its state, so that frozen weights are neither copied
nor saved.

Losses are sums with the number of positions, so that a batch in several parts has the gradient of
the whole, also where a mask leaves each part another number of positions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from algorithms.optimizers.evaluation import start_params
from algorithms.optimizers.groups import compiled, named
from algorithms.tensors import CompressedTensor


class Buffer(nnx.Variable):
    """What the forward pass updates by itself: no gradient, but part of the state that is saved."""


class BackwardBuffer(Buffer):
    """What the backward pass updates: its gradient is its next value.

    So a layer with a `custom_vjp` remembers what it saw of gradients: it hands the new value back
    as the cotangent of the old one. A floating-point array, to be used once in each forward pass.
    """


def exact(variable: Any) -> Any:
    """The same variable, kept in its own dtype whatever a step computes in: what it is rounded to
    is part of what is stored.
    """
    variable.set_metadata(exact=True)
    return variable


class Batch(NamedTuple):
    """Of B windows of T tokens, or of B examples (no T)."""

    inputs: Any  # [B, T] tokens, or [B, …]
    targets: Any  # [B, T] or [B]
    mask: Any | None = None  # what each position counts; None: all count one
    taught: Any | None = None  # what a teacher said of each position, stored before


@runtime_checkable
class Predictions(Protocol):
    """What a model's `predictions(inputs)` gives: logits of n positions, not computed yet, as
    h Wᵀ, capped where it says so; without W, h are the logits.
    """

    @property
    def hidden(self) -> Float[Array, "n d"]: ...
    @property
    def weight(self) -> Float[Array, "v d"] | None: ...
    @property
    def cap(self) -> float | None: ...
    @property
    def features(self) -> tuple[Any, ...]:
        """Activations that were asked for, in order."""
        ...

    @property
    def related(self) -> tuple[Any, ...]:
        """Queries, keys and values that were."""
        ...

    @property
    def logits(self) -> Float[Array, "n v"]: ...


class Sums(NamedTuple):
    """Over the positions of a batch."""

    loss: Float[Array, ""]  # what is minimized, once it is divided by their number
    positions: Float[Array, ""]  # or what they count together
    watched: dict[str, Float[Array, ""]] = {}  # what is only looked at, sums too  # noqa: RUF012

    def means(self) -> dict[str, Float[Array, ""]]:
        found = {"loss": self.loss, **self.watched}
        return {name: total / self.positions for name, total in found.items()}


@runtime_checkable
class Objective(Protocol):
    """What is minimized. It is hashable, and made once for a run.

    It may have a method `prepare(model, teacher, key)`, which gives the model what is learned
    beside it before training, and `dismiss(model)`, which takes that away from what is saved.
    """

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        """model, teacher: modules with `predictions`; teacher: None where there is none. training:
        whether it is minimized now, or only evaluated.
        """
        ...


class TrainState(NamedTuple):
    """What a step changes, and all that a later step depends on beside its batch."""

    step: Int[Array, ""]  # steps done
    params: Any
    buffers: Any
    optimizer: optax.OptState
    key: Key[Array, ""]  # the run's; each step folds its number in


class Parts(NamedTuple):
    """A model taken apart."""

    graph: Any
    params: Any
    buffers: Any
    fixed: Any

    def merged(self, params: Any, buffers: Any) -> nnx.Module:
        return nnx.merge(self.graph, params, buffers, self.fixed, copy=True)


def take_apart(model: nnx.Module, trainable: str = ".*") -> Parts:
    """trainable: the regular expression that a parameter's whole path matches if it is learned.

    Raises ValueError if it is none, or matches no parameter.
    """
    pattern = compiled(trainable, "trainable")

    def learned(path: tuple[Any, ...], variable: Any) -> bool:
        name = ".".join(map(str, path))
        return isinstance(variable, nnx.Param) and bool(pattern.fullmatch(name))

    split: Any = nnx.split(model, learned, Buffer, ...)
    parts = Parts(*split)
    if not jax.tree.leaves(parts.params):
        raise ValueError(f"trainable={trainable!r} matches no parameter of the model.")
    return parts


def init(parts: Parts, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> TrainState:
    """Before the first step, at the parameters that the optimizer begins with."""
    made = optimizer.init(parts.params)
    params = start_params(made, parts.params)
    return TrainState(jnp.zeros((), jnp.int32), params, parts.buffers, made, key)


class Metrics(NamedTuple):
    """Of one step."""

    means: dict[str, Float[Array, ""]]
    gradient_norm: Float[Array, ""]
    bad: Int[Array, ""]  # the first leaf whose gradient is not finite; -1: all are


def take_step(
    state: TrainState,
    fixed: Any,
    teacher: Any,
    batch: Batch,
    *,
    graph: Any,
    teacher_graph: Any = None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    dtype: DTypeLike | None = None,
    layout: tuple[Any, ...] | None = None,
) -> tuple[TrainState, Metrics]:
    """The state after one step of the optimizer on one batch.

    fixed, teacher: the arrays of what is not learned. accumulate: parts that the batch comes in,
    one after the other, to save memory. dtype: what the model computes in; None: in its own.
    layout: where each leaf of the state lies (`models.sharding`); None: on one device.
    """
    key = jax.random.fold_in(state.key, state.step)
    forward = functools.partial(
        sums, fixed=fixed, teacher=teacher, graph=graph, teacher_graph=teacher_graph,
        objective=objective, dtype=dtype, training=True,
    )  # fmt: skip

    def gradients(params: Any) -> tuple[Any, Any, Sums]:
        return _accumulated(forward, params, state.buffers, batch, key, accumulate)

    def value(params: Any, *_: Any) -> Float[Array, ""]:
        found = gradients(params)[2]
        return found.loss / found.positions

    grads, buffers, found = gradients(state.params)
    loss = found.loss / found.positions
    squares = jnp.stack(
        [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
    )
    bad = jnp.where(jnp.all(jnp.isfinite(squares)), -1, jnp.argmin(jnp.isfinite(squares)))
    updates, moved = optax.with_extra_args_support(optimizer).update(
        grads, state.optimizer, state.params, value=loss, grad=grads, value_fn=value, loss=loss,
        grad_fn=lambda params, *_: gradients(params)[0], obj_fn=value,
    )  # fmt: skip
    after = TrainState(
        state.step + 1, optax.apply_updates(state.params, updates), buffers, moved, state.key
    )
    return constrained(after, layout), Metrics(
        found.means(), jnp.sqrt(jnp.sum(squares)), bad.astype(jnp.int32)
    )


step: Any = jax.jit(
    take_step,
    static_argnames=(
        "graph", "teacher_graph", "objective", "optimizer", "accumulate", "dtype", "layout",
    ),
    donate_argnames=("state",),
)  # fmt: skip


def constrained(tree: Any, layout: tuple[Any, ...] | None) -> Any:
    """A tree whose leaves lie as the shardings of `layout` say, in order; None: wherever."""
    if layout is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    placed = [lax.with_sharding_constraint(x, s) for x, s in zip(leaves, layout, strict=True)]
    return jax.tree.unflatten(structure, placed)


def sums(
    params: Any, buffers: Any, batch: Batch, key: Key[Array, ""], *, fixed: Any, teacher: Any,
    graph: Any, teacher_graph: Any, objective: Objective, dtype: DTypeLike | None, training: bool,
) -> tuple[Sums, Any]:  # fmt: skip
    """The objective on a batch, and the buffers that the forward pass leaves."""
    model: Any = nnx.merge(graph, *(_cast(x, dtype) for x in (params, buffers, fixed)), copy=True)
    taught: Any = None
    if teacher_graph is not None:
        taught = nnx.merge(teacher_graph, lax.stop_gradient(_cast(teacher, dtype)), copy=True)
    found = objective(model, taught, batch, key, training=training)
    return found, jax.tree.map(
        lambda new, old: new.astype(old.dtype), nnx.state(model, Buffer), buffers
    )


def _cast(tree: Any, dtype: DTypeLike | None) -> Any:
    """Floating-point arrays in the dtype that is computed in; compressed weights stay as they are,
    whose scales are part of what is stored, and so do `exact` variables.
    """
    if dtype is None:
        return tree

    def kept(x: Any) -> bool:
        if isinstance(x, nnx.Variable):
            return x.get_metadata().get("exact", False)
        return isinstance(x, CompressedTensor)

    def cast(x: Any) -> Any:
        floating = not kept(x) and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if floating else x

    return jax.tree.map(cast, tree, is_leaf=kept)


def _accumulated(
    forward: Callable[..., Any], params: Any, buffers: Any, batch: Batch, key: Any, parts: int
) -> tuple[Any, Any, Sums]:
    """Gradients of the mean loss, the buffers and the sums, over a batch in parts."""

    def total(params: Any, told: Any, rest: Any, batch: Batch, key: Any) -> tuple[Any, Any]:
        found, buffers = forward(params, nnx.merge_state(told, rest), batch, key)
        return found.loss.astype(jnp.float32), (found, buffers)

    def gradient(params: Any, buffers: Any, batch: Batch, key: Any) -> tuple[Any, Any]:
        told, rest = nnx.split_state(buffers, BackwardBuffer, ...)
        both = jax.grad(total, argnums=(0, 1), has_aux=True)
        (grads, told), (found, buffers) = both(params, told, rest, batch, key)
        _, rest = nnx.split_state(buffers, BackwardBuffer, ...)
        return grads, (found, nnx.merge_state(told, rest))

    if parts == 1:
        grads, (found, buffers) = gradient(params, buffers, batch, key)
    else:
        grads, found, buffers = _in_parts(gradient, params, buffers, batch, key, parts)
    return jax.tree.map(lambda g: (g / found.positions).astype(g.dtype), grads), buffers, found


def _in_parts(gradient, params, buffers, batch: Batch, key, parts: int):
    size = len(batch.inputs)
    if size % parts:
        raise ValueError(f"accumulate={parts} must divide the batch of {size}.")
    pieces = jax.tree.map(lambda x: x.reshape(parts, size // parts, *x.shape[1:]), batch)
    keys = jax.random.split(key, parts)
    shapes = jax.eval_shape(gradient, params, buffers, jax.tree.map(lambda x: x[0], pieces), key)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1][0]))

    def add(carry, piece):
        grads, found, buffers = carry
        more, (extra, buffers) = gradient(params, buffers, *piece)
        return (
            jax.tree.map(jnp.add, grads, more),
            jax.tree.map(jnp.add, found, extra),
            buffers,
        ), None

    return lax.scan(add, (*nothing, buffers), (pieces, keys))[0]


@functools.partial(jax.jit, static_argnames=("graph", "teacher_graph", "objective", "dtype"))
def evaluate(
    params: Any,
    buffers: Any,
    fixed: Any,
    teacher: Any,
    batch: Batch,
    key: Key[Array, ""],
    *,
    graph: Any,
    teacher_graph: Any = None,
    objective: Objective,
    dtype: DTypeLike | None = None,
) -> Sums:
    """The objective on a batch with given parameters; nothing is changed."""
    return sums(
        params, buffers, batch, key, fixed=fixed, teacher=teacher, graph=graph,
        teacher_graph=teacher_graph, objective=objective, dtype=dtype, training=False,
    )[0]  # fmt: skip


def leaf_names(params: Any) -> list[str]:
    """What `Metrics.bad` counts."""
    return list(named(params))
