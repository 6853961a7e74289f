"""k-means: Lloyd's iterations, and the seeding of k-means++.

Lloyd, IEEE Transactions on Information Theory 1982; Arthur, Vassilvitskii, SODA 2007. For points
x_n with weights v_n, find k centroids c_j and an assignment a_n that make the inertia small:
    J = Σ_n v_n ‖x_n - c_{a_n}‖²
    a_n <- argmin_j ‖x_n - c_j‖²,   c_j <- Σ_{a_n = j} v_n x_n / Σ_{a_n = j} v_n
Neither half of a step raises J. k-means++ draws first centroids from the points, each with a
probability in proportion to v_n times the squared distance to the nearest one drawn before.

A cluster without weight is seeded anew: of the points, ordered by falling v_n ‖x_n - c_{a_n}‖², the
first goes to the first empty cluster, the second to the second, and so on. It served no point, so
moving it cannot raise J either.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

_TABLE = 2**19  # distances at a time: 2 MB of float32, which a processor's cache holds
_FEWEST = 128  # points at a time, at least: 32 MB for 65536 centroids


class Clusters(NamedTuple):
    """Centroids, the nearest of them for each point, and J before each step and after the last."""

    centroids: Float[Array, "k d"]
    assignment: Int[Array, " n"]
    inertia: Float[Array, " t"]


@functools.partial(jax.jit, static_argnames=("k", "steps", "init"))
def kmeans(
    key: Key[Array, ""],
    x: Float[Array, "n d"],
    k: int,
    *,
    weights: Float[Array, " n"] | None = None,
    steps: int = 25,
    init: str = "k-means++",
) -> Clusters:
    """Cluster the points x into k groups by `steps` of Lloyd's iterations.

    weights: how much each point counts, not negative; None for one each. init: "k-means++", or
    "random" for k of the points (with repetition where there are fewer). May be vmapped.

    Raises ValueError for a k, a number of steps or an init that means nothing.
    """
    if k < 1 or steps < 0 or not x.shape[0]:
        raise ValueError(
            f"k={k} must be positive, steps={steps} not negative, and there must be points to "
            f"cluster, {x.shape=}."
        )
    if init not in _SEEDINGS:
        raise ValueError(f"init={init!r} must be one of {', '.join(map(repr, _SEEDINGS))}.")
    v = jnp.ones(x.shape[0], x.dtype) if weights is None else weights.astype(x.dtype)

    def step(state, _):
        centroids, assignment, cost = state
        centroids = _move(x, v, assignment, cost, centroids)
        assignment, cost = _assign(x, v, centroids)
        return (centroids, assignment, cost), cost.sum()

    centroids = _SEEDINGS[init](key, x, v, k)
    assignment, cost = _assign(x, v, centroids)
    state, history = lax.scan(step, (centroids, assignment, cost), length=steps)
    return Clusters(state[0], state[1], jnp.concatenate([cost.sum()[None], history]))


def nearest(x: Float[Array, "n d"], centroids: Float[Array, "k d"]) -> Int[Array, " n"]:
    """The index of the centroid nearest to each point, some points at a time."""
    (n, d), k = x.shape, centroids.shape[0]
    chunk = min(n, max(_FEWEST, _TABLE // k))
    padded = jnp.zeros((-n % chunk, d), x.dtype)
    table = jnp.concatenate([centroids, jnp.sum(centroids**2, 1, keepdims=True)], 1)

    def one_chunk(points):  # ‖c‖² - 2 x·c as one product, [k, chunk]
        columns = jnp.concatenate([-2 * points.T, jnp.ones((1, chunk), x.dtype)])
        return first_least(table @ columns)

    chunks = jnp.concatenate([x, padded]).reshape(-1, chunk, d)
    return lax.map(one_chunk, chunks).reshape(-1)[:n]


def first_least(costs: Float[Array, "k n"]) -> Int[Array, " n"]:
    """The row of each column's least entry, the first of equal ones: `argmin(costs, 0)`.

    Two plain reductions, which vectorize: five times as fast on a CPU as one over pairs. Both must
    read the same bits, so `costs` should be the result of a product, which is not computed twice.
    """
    k = costs.shape[0]
    rows = lax.broadcasted_iota(jnp.int32, costs.shape, 0)
    least = jnp.min(costs, 0, keepdims=True)
    return jnp.min(jnp.where(costs == least, rows, k - 1), 0)  # NaN equals nothing: the last row


def _assign(x, v, centroids):
    """The nearest centroid of each point and v ‖x - c‖², from differences: they do not cancel."""
    assignment = nearest(x, centroids)
    return assignment, v * jnp.sum((x - centroids[assignment]) ** 2, 1)


def _move(x, v, assignment, cost, centroids):
    """Each centroid to its points' mean, or to a far point if it has none."""
    k = centroids.shape[0]
    total = jax.ops.segment_sum(v, assignment, k)
    mean = jax.ops.segment_sum(v[:, None] * x, assignment, k)
    empty = total == 0
    mean = mean / jnp.where(empty, 1, total)[:, None]
    far = lax.cond(empty.any(), lambda: _farthest(x, cost, empty), lambda: centroids)
    return jnp.where(empty[:, None], far, mean)


def _farthest(x, cost, empty):
    """For the j-th empty cluster the j-th farthest point; what other clusters get is not used."""
    far = jnp.argsort(-cost)
    rank = jnp.cumsum(empty) - 1
    return x[far[rank % x.shape[0]]]


def _random_points(key, x, v, k):
    """k points in random order; those without weight last."""
    order = jnp.argsort(jax.random.uniform(key, v.shape) + (v == 0))
    return x[order[jnp.arange(k) % x.shape[0]]]


def _plus_plus(key, x, v, k):
    def draw(key, mass):
        mass = jnp.where(mass.sum() > 0, mass, v)  # fewer different points than k: any will do
        ends = jnp.cumsum(mass)
        at = jnp.searchsorted(ends, jax.random.uniform(key, (), x.dtype) * ends[-1], side="right")
        return x[jnp.minimum(at, x.shape[0] - 1)]

    def step(distance, key):
        point = draw(key, v * distance)
        return jnp.minimum(distance, jnp.sum((x - point) ** 2, 1)), point

    keys = jax.random.split(key, k)
    first = draw(keys[0], v)
    _, others = lax.scan(step, jnp.sum((x - first) ** 2, 1), keys[1:])
    return jnp.concatenate([first[None], others])


_SEEDINGS: dict[str, Callable] = {"k-means++": _plus_plus, "random": _random_points}
