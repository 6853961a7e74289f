"""What sparse training shares: masks over matrices, and an optimizer around which they are kept.

Pruned weights are stored as zeros, so a model's gradients there are those of the dense model: what
RigL grows by. The optimizer within sees zeros in their place, so that its moments there decay, as
in official code, where masks are multiplied into the weights. What is newly alive begins at zero,
with moments of zero.

A leaf's last two axes are a matrix [in, out], axes before them a batch with a mask for each.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from algorithms.optimizers.groups import compiled, named, path_name
from algorithms.pruning.patterns import top

MATCH = r"blocks\..*\.kernel"


class Masks(NamedTuple):
    """Which weights are alive: like the parameters, MaskedNode for those that are always dense."""

    alive: Any

    def applied(self, tree: Any) -> Any:
        """Zeros in place of what is not alive."""
        return self.map(lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)), tree)

    def moved(self, updates: Any, params: Any) -> Any:
        """Updates that leave what is not alive at exactly zero, wherever it was."""
        return self.map(
            lambda m, u, p: jnp.where(m, u.astype(p.dtype), -p), updates, params,
            dense=lambda u, p: u.astype(p.dtype),
        )  # fmt: skip

    def map(self, function: Callable[..., Any], *trees: Any, dense: Any = lambda x: x) -> Any:
        """function(mask, *leaves), and dense(*leaves) where there is no mask."""

        def each(m: Any, *leaves: Any) -> Any:
            if not _absent(m):
                return function(m, *leaves)
            return leaves[0] if _absent(leaves[0]) else dense(*leaves)

        return jax.tree.map(each, self.alive, *trees, is_leaf=_absent)

    def eval_params(self, params: Any) -> Any:
        return self.applied(params)

    def start_params(self, params: Any) -> Any:
        return self.applied(params)


class SparseState(NamedTuple):
    masks: Masks  # first: what is evaluated comes to the first member last
    inner: optax.OptState
    steps: Int[Array, ""]  # done
    key: Key[Array, ""]


class Rewiring(NamedTuple):
    """When and how masks move; of n weights in each matrix, *b matrices at once.

    due(count): whether they do after so many steps. rewired(alive, weights, gradients, count, key):
    the masks after it, [*b, n] as the arguments. instead: in place of a step of the optimizer, by
    its gradients; else behind it, and count includes that step.
    """

    due: Callable[[Int[Array, ""]], Bool[Array, ""]]
    rewired: Callable[..., Bool[Array, "*b n"]]
    instead: bool = False


def masked_training(
    inner: optax.GradientTransformation,
    *,
    alive: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, int]],
    rewiring: Rewiring | None,
    match: str,
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of parameters of which some are kept at zero.

    alive: how many weights of each matrix are so at first, by the paths and shapes of all leaves
    that are pruned; which ones is drawn from `seed`. match: the regular expression that the whole
    path of such a leaf matches; leaves of one axis are never pruned. Raises ValueError at `init` if
    there is none.
    """
    within = optax.with_extra_args_support(inner)

    def init(params: Any) -> SparseState:
        key = jax.random.key(seed)
        masks = _drawn(params, alive(_pruned(params, match)), key)
        return SparseState(masks, within.init(masks.applied(params)), jnp.zeros((), jnp.int32), key)

    def update(gradients: Any, state: SparseState, params: Any = None, **extra: Any):
        masks, count = state.masks, state.steps

        def step() -> tuple[Any, optax.OptState, Masks]:
            found, moments = within.update(masks.applied(gradients), state.inner, params, **extra)
            return masks.moved(found, params), moments, masks

        def rewire() -> tuple[Any, optax.OptState, Masks]:
            assert rewiring is not None
            if rewiring.instead:
                found, moments = jax.tree.map(jnp.zeros_like, params), state.inner
            else:
                found, moments, _ = step()
            weights = masks.applied(optax.apply_updates(params, found))
            done = count if rewiring.instead else count + 1
            later = _rewired(rewiring, masks, weights, gradients, done, state.key)
            born = later.map(lambda new, old: new & ~old, masks.alive)
            kept = Masks(later.map(lambda new, old: new & old, masks.alive))
            return kept.moved(found, params), _without(moments, born), later

        if rewiring is None:
            found, moments, later = step()
        else:
            due = rewiring.due(count if rewiring.instead else count + 1)
            found, moments, later = lax.cond(due, rewire, step)
        return found, SparseState(later, moments, count + 1, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def regrown(
    alive: Bool[Array, "*b n"],
    weights: Float[Array, "*b n"],
    growth: Float[Array, "*b n"],
    fraction: Float[Array, ""] | float,
) -> Bool[Array, "*b n"]:
    """Without a fraction of what is alive, the smallest weights, and with as many others: those of
    the largest growth, which may have been dropped just now.
    """
    n = alive.sum(-1)
    dropped = (n.astype(jnp.float32) * fraction).astype(jnp.int32)
    kept = top(jnp.where(alive, jnp.abs(weights.astype(jnp.float32)), -1.0), n - dropped)
    return kept | top(jnp.where(kept, -jnp.inf, growth.astype(jnp.float32)), dropped)


def periodic(
    every: int, *, start: int, stop: int | float
) -> Callable[[Int[Array, ""]], Bool[Array, ""]]:
    """Whether it is time after `count` steps: from start to stop, both included."""
    if every < 1:
        raise ValueError(f"every={every} must be at least 1.")

    def due(count: Int[Array, ""]) -> Bool[Array, ""]:
        return (count >= start) & (count <= stop) & ((count - start) % every == 0)

    return due


def require_fraction(name: str, value: int | float) -> None:
    """Raise ValueError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} must be above 0 and at most 1.")


def _absent(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _pruned(params: Any, match: str) -> dict[str, tuple[int, ...]]:
    pattern = compiled(match, "match")
    shapes = {name: leaf.shape for name, leaf in named(params).items() if leaf.ndim > 1}
    found = {name: shape for name, shape in shapes.items() if pattern.fullmatch(name)}
    if not found:
        raise ValueError(f"match={match!r} matches no matrix among {', '.join(shapes) or 'none'}.")
    return found


def _key(key: Key[Array, ""], path: Any) -> Key[Array, ""]:
    """Of one leaf, whichever others there are."""
    return jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))


def _drawn(params: Any, alive: Mapping[str, int], key: Key[Array, ""]) -> Masks:
    def one(path: Any, p: Any) -> Any:
        if (count := alive.get(path_name(path))) is None:
            return optax.MaskedNode()
        *b, i, o = p.shape
        scores = jax.random.uniform(_key(key, path), (*b, i * o))
        return top(scores, count).reshape(p.shape)

    return Masks(jax.tree_util.tree_map_with_path(one, params))


def _rewired(
    rewiring: Rewiring, masks: Masks, weights: Any, gradients: Any, count: Any, key: Any
) -> Masks:
    key = jax.random.fold_in(key, count)

    def one(path: Any, m: Any, w: Any, g: Any) -> Any:
        if _absent(m):
            return m
        *b, i, o = m.shape
        rows = (x.reshape(*b, i * o) for x in (m, w, g))
        return rewiring.rewired(*rows, count, _key(key, path)).reshape(m.shape)

    return Masks(
        jax.tree_util.tree_map_with_path(one, masks.alive, weights, gradients, is_leaf=_absent)
    )


def _without(moments: optax.OptState, born: Any) -> optax.OptState:
    """Zeros for what is newly alive: in leaves under a parameter's own path that have its shape."""
    leaves = dict(jax.tree_util.tree_leaves_with_path(born))
    depths = {len(path) for path in leaves}

    def one(path: Any, x: Any) -> Any:
        for depth in depths:
            new = leaves.get(path[len(path) - depth :])
            if new is not None and new.shape == x.shape:
                return jnp.where(new, jnp.zeros((), x.dtype), x)
        return x

    return jax.tree_util.tree_map_with_path(one, moments)
