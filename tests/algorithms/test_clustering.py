"""k-means against a slow one in NumPy, and what Lloyd's iterations and k-means++ promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from algorithms import clustering
from algorithms.clustering import first_least, kmeans, nearest


def equations(jaxpr):
    """The number of equations of a traced graph, those inside its loops and calls included."""
    inner = (
        p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()), is_leaf=_graph)
    )
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner if _graph(p))


def _graph(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def points(seed=0, n=90, d=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + 4 * rng.integers(0, 3, (n, 1))


def lloyd(x, v, centroids, steps):
    """Lloyd's iterations; an empty cluster takes the farthest point that no earlier one took."""
    k, history = len(centroids), []
    for step in range(steps + 1):
        distances = ((x[:, None] - centroids) ** 2).sum(-1)
        assignment = distances.argmin(1)
        cost = v * distances.min(1)
        history.append(cost.sum())
        if step == steps:
            return centroids, assignment, np.array(history)
        far, centroids = list(np.argsort(-cost, kind="stable")), centroids.copy()
        for j in range(k):
            mine = assignment == j
            if v[mine].sum() > 0:
                centroids[j] = (v[mine, None] * x[mine]).sum(0) / v[mine].sum()
            else:
                centroids[j] = x[far.pop(0)]
    raise AssertionError


@pytest.mark.parametrize(
    ("k", "init", "weighted"),
    [(1, "random", True), (5, "random", False), (40, "k-means++", False), (40, "k-means++", True)],
)
def test_equals_a_slow_lloyd_from_the_same_centroids(k, init, weighted):
    x, key = points(k), jax.random.key(k)
    v = np.random.default_rng(1).exponential(size=len(x)) if weighted else np.ones(len(x))
    weights = jnp.asarray(v) if weighted else None
    start = kmeans(key, jnp.asarray(x), k, weights=weights, steps=0, init=init)
    found = kmeans(key, jnp.asarray(x), k, weights=weights, steps=6, init=init)
    centroids, assignment, history = lloyd(x, v, np.asarray(start.centroids), 6)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-10)
    np.testing.assert_array_equal(found.assignment, assignment)
    np.testing.assert_allclose(found.inertia, history, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_is_scikit_learns_from_the_same_centroids(weighted):
    x = points(3, n=200)
    v = np.random.default_rng(1).exponential(size=len(x)) if weighted else None
    weights = None if v is None else jnp.asarray(v)
    same = kmeans(jax.random.key(1), jnp.asarray(x), 6, weights=weights, steps=0)
    theirs = KMeans(6, init=np.asarray(same.centroids), n_init=1, max_iter=40, tol=0)
    theirs = theirs.fit(x, sample_weight=v)
    found = kmeans(jax.random.key(1), jnp.asarray(x), 6, weights=weights, steps=40)
    np.testing.assert_array_equal(found.assignment, theirs.labels_)
    np.testing.assert_allclose(found.centroids, theirs.cluster_centers_, atol=1e-10)
    np.testing.assert_allclose(found.inertia[-1], theirs.inertia_, rtol=1e-10)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_inertia_never_rises_and_is_that_of_the_result(init):
    for seed in range(5):
        x = jnp.asarray(points(seed, n=300))
        found = kmeans(jax.random.key(seed), x, 30, steps=20, init=init)
        assert found.inertia.shape == (21,)
        assert (jnp.diff(found.inertia) <= 1e-12 * found.inertia[0]).all()
        assert found.inertia[-1] < 0.9 * found.inertia[0]
        total = jnp.sum((x - found.centroids[found.assignment]) ** 2)
        np.testing.assert_allclose(total, found.inertia[-1])


def test_empty_clusters_move_to_the_farthest_points():
    """Five centroids on one point, of which four serve none."""
    x = jnp.asarray([[0.0], [0.0], [0.0], [1.0], [9.0], [-5.0], [3.0]])
    centroids = jnp.zeros((5, 1))
    assignment, cost = clustering._assign(x, jnp.ones(7), centroids)
    moved = clustering._move(x, jnp.ones(7), assignment, cost, centroids)
    np.testing.assert_allclose(moved[1:, 0], [9, -5, 3, 1])
    np.testing.assert_allclose(moved[0, 0], 8 / 7)


def test_points_without_weight_count_for_nothing():
    x = np.concatenate([points(2), 1000 + points(3)])
    weights = jnp.asarray(np.repeat([1.0, 0.0], 90))
    found = kmeans(jax.random.key(0), jnp.asarray(x), 6, weights=weights, steps=10)
    assert jnp.abs(found.centroids).max() < 100
    assert found.assignment.shape == (180,)


def test_weights_count_like_repetition():
    x = points(4, n=20)
    times = np.random.default_rng(0).integers(1, 4, 20)
    v, repeated = jnp.asarray(times, jnp.float64), np.repeat(x, times, 0)
    found = kmeans(jax.random.key(3), jnp.asarray(x), 4, weights=v, steps=8)
    start = kmeans(jax.random.key(3), jnp.asarray(x), 4, weights=v, steps=0)
    centroids, _, history = lloyd(repeated, np.ones(len(repeated)), np.asarray(start.centroids), 8)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-10)
    np.testing.assert_allclose(found.inertia, history, rtol=1e-9)


def test_plus_plus_starts_better_than_random_points():
    """Twenty tight clusters far apart: random points miss many, k-means++ few."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(np.repeat(100 * rng.normal(size=(20, 2)), 10, 0) + rng.normal(size=(200, 2)))
    inertia = {
        init: np.mean(
            [kmeans(jax.random.key(s), x, 20, steps=0, init=init).inertia for s in (1, 2)]
        )
        for init in ("k-means++", "random")
    }
    assert inertia["k-means++"] < 0.2 * inertia["random"]


def test_more_clusters_than_different_points_are_exact_and_finite():
    x = jnp.asarray([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])
    for init in ("k-means++", "random"):
        found = kmeans(jax.random.key(0), x, 7, steps=3, init=init)
        assert jnp.isfinite(found.centroids).all() and found.inertia[-1] == 0
    zeros = kmeans(jax.random.key(0), jnp.zeros((5, 2)), 3, steps=3)
    assert not zeros.centroids.any() and not zeros.inertia.any()


def test_batches_by_vmap():
    x = jnp.stack([jnp.asarray(points(s)) for s in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(lambda key, x: kmeans(key, x, 12, steps=5))(keys, x)
    for n in range(3):
        alone = kmeans(keys[n], x[n], 12, steps=5)
        np.testing.assert_array_equal(together.assignment[n], alone.assignment)
        np.testing.assert_allclose(together.centroids[n], alone.centroids, atol=1e-12)


@pytest.mark.parametrize("n", [1, 127, 128, 300])
def test_nearest_goes_some_points_at_a_time(n, monkeypatch):
    monkeypatch.setattr(clustering, "_TABLE", 64)
    x, centroids = points(6, n=n), points(7, n=11)
    expected = ((x[:, None] - centroids) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(nearest(jnp.asarray(x), jnp.asarray(centroids)), expected)


def test_no_table_of_distances_is_larger_than_64_megabytes():
    """Of the shapes in the program, for many points and for many centroids."""
    for n, k in ((10**6, 256), (10**6, 2**16)):
        program = jax.make_jaxpr(nearest)(
            jax.ShapeDtypeStruct((n, 8), jnp.float32), jax.ShapeDtypeStruct((k, 8), jnp.float32)
        )
        (loop,) = [e for e in program.eqns if e.primitive.name == "scan"]
        sizes = [v.aval.size for e in loop.params["jaxpr"].eqns for v in e.outvars]
        assert max(sizes) * 4 <= 64 * 2**20


def test_first_least_is_argmin():
    costs = jnp.asarray(np.random.default_rng(8).integers(0, 5, (9, 40)), jnp.float64)
    np.testing.assert_array_equal(first_least(costs), jnp.argmin(costs, 0))
    assert (first_least(jnp.full((4, 3), jnp.nan)) < 4).all()


def test_the_graph_does_not_grow():
    def size(n, k):
        x = jax.ShapeDtypeStruct((n, 4), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return equations(jax.make_jaxpr(lambda key, x: kmeans(key, x, k))(key, x).jaxpr)

    assert size(500, 8) == size(1000, 32) < 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=0), "k=0 must be positive"),
        (dict(k=2, steps=-1), "steps=-1 not negative"),
        (dict(k=2, init="best"), "init='best' must be one of 'k-means\\+\\+', 'random'"),
    ],
)
@pytest.mark.some(1)
def test_refuses_what_means_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        kmeans(jax.random.key(0), jnp.ones((3, 2)), **options)
    with pytest.raises(ValueError, match="there must be points to cluster"):
        kmeans(jax.random.key(0), jnp.ones((0, 2)), 2)
