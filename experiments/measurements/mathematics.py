"""Our mathematics against scikit-learn's, SciPy's and NumPy's: time, and how far results are apart.

Both run in one process, on the same numbers in float32, each once before it is timed and then in
turns; a ratio is the median over turns. Compilation is beside it, with nothing kept from runs
before if JAX_COMPILATION_CACHE_DIR names an empty folder. scikit-learn comes with the extra `test`:
where it is not installed, what it is the oracle of is left out.
"""

import importlib.metadata
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
import scipy.sparse.linalg
from jax.scipy.sparse.linalg import cg
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from algorithms import clustering
from algorithms.alignment import align_neurons
from algorithms.linalg import (
    eigenpairs,
    inverse_root,
    lanczos,
    newton_inverse_root,
    pca,
    polar_express,
    polar_factor,
    randomized_eigh,
    randomized_svd,
)
from algorithms.transport import sinkhorn
from experiments import progress
from kernels.hadamard import hadamard

FILLED = 0.05  # seconds that a turn lasts at least
SKLEARN = "scikit-learn"


class Case(NamedTuple):
    """One function at one size, and the oracle's way to the same numbers."""

    size: str
    inputs: tuple[Any, ...]  # NumPy arrays, of both
    ours: Callable[..., Any]
    oracle: str  # the package
    theirs: Callable[..., Any]
    apart: Callable[[Any, Any], float]  # ours, theirs: a relative difference


def mathematics(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each function and size of the settings."""
    settings = plain["mathematics"]
    asked = [(name, n) for name, sizes in settings["sizes"].items() for n in sizes]
    rows = []
    with progress.steps("mathematics", len(asked)) as tell:
        for name, n in asked:
            case = CASES[name](n, np.random.default_rng(0))
            if case.oracle != SKLEARN or importlib.util.find_spec("sklearn"):
                rows.append({"function": name, **_row(case, settings["turns"])})
            tell(f"{name}, {n}")
    return rows


def _row(case: Case, turns: int) -> dict[str, Any]:
    arrays = jax.device_put(case.inputs)
    start = time.perf_counter()
    program = jax.jit(case.ours).lower(*arrays).compile()
    compile_seconds = time.perf_counter() - start
    found, expected = jax.block_until_ready(program(*arrays)), case.theirs(*case.inputs)
    timed = [
        (_seconds(lambda: jax.block_until_ready(program(*arrays))),
         _seconds(lambda: case.theirs(*case.inputs)))
        for _ in range(turns)
    ]  # fmt: skip
    return {
        "size": case.size,
        "compile_seconds": compile_seconds,
        "seconds": statistics.median(ours for ours, _ in timed),
        "oracle": f"{case.oracle} {importlib.metadata.version(case.oracle)}",
        "oracle_seconds": statistics.median(theirs for _, theirs in timed),
        "times_faster": statistics.median(theirs / ours for ours, theirs in timed),
        "apart": case.apart(jax.tree.map(np.asarray, found), expected),
    }


def _seconds(call: Callable[[], Any]) -> float:
    """Of one call: the mean of as many as fill a turn."""
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < FILLED:
        call()
        count += 1
    return (time.perf_counter() - start) / count


def _largest(found: Any, expected: Any) -> float:
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def _kmeans(n: int, rng: np.random.Generator) -> Case:
    """Apart: the inertia, by which theirs is lower; each draws its own k-means++."""
    x = rng.normal(size=(n, 16)).astype(np.float32)

    def theirs(x: Any) -> Any:
        from sklearn.cluster import KMeans

        return KMeans(64, n_init=1, max_iter=25, tol=0, random_state=0).fit(x).inertia_

    return Case(
        f"{n} × 16, 64 clusters", (x,),
        lambda x: clustering.kmeans(jax.random.key(0), x, 64).inertia[-1],
        SKLEARN, theirs, lambda ours, theirs: float(ours / theirs - 1),
    )  # fmt: skip


def _decaying(n: int, rng: np.random.Generator) -> np.ndarray:
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    return ((left / (1 + np.arange(n))) @ right).astype(np.float32)


def _randomized_svd(n: int, rng: np.random.Generator) -> Case:
    def theirs(m: Any) -> Any:
        from sklearn.utils.extmath import randomized_svd as of_sklearn

        return of_sklearn(m, 32, n_iter=2, power_iteration_normalizer="QR", random_state=0)[1]

    return Case(
        f"{n} × {n}, rank 32", (_decaying(n, rng),),
        lambda m: randomized_svd(jax.random.key(0), m, 32)[1], SKLEARN, theirs, _largest,
    )  # fmt: skip


def _randomized_eigh(n: int, rng: np.random.Generator) -> Case:
    """Of an error as rounding's, its columns as uneven as activations are. Apart: the part of what
    the best directions keep that ours lose.
    """
    e = (rng.uniform(-1, 1, (n, n)) * np.exp(rng.normal(size=n))).astype(np.float32)

    def ours(e: Any) -> Any:
        return randomized_eigh(jax.random.key(0), lambda v: e @ (e.T @ v), n, 32)[0].sum()

    def theirs(e: Any) -> Any:
        return scipy.linalg.eigvalsh(e @ e.T, subset_by_index=(n - 32, n - 1)).sum()

    return Case(
        f"{n} × {n}, rank 32", (e,), ours, "scipy", theirs,
        lambda ours, theirs: float(1 - ours / theirs),
    )  # fmt: skip


def _pca(n: int, rng: np.random.Generator) -> Case:
    x = (rng.normal(size=(n, 256)) @ _decaying(256, rng)).astype(np.float32)

    def theirs(x: Any) -> Any:
        from sklearn.decomposition import PCA

        found = PCA(32, svd_solver="randomized", iterated_power=2, random_state=0,
                    power_iteration_normalizer="QR").fit(x)  # fmt: skip
        return found.explained_variance_

    return Case(
        f"{n} × 256, rank 32", (x,),
        lambda x: pca(jax.random.key(0), x, 32).variances, SKLEARN, theirs, _largest,
    )  # fmt: skip


def _symmetric(n: int, rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    a = (q * values) @ q.T
    return ((a + a.T) / 2).astype(np.float32)


def _lanczos(n: int, rng: np.random.Generator) -> Case:
    """The largest six: ours in 64 steps, theirs until they are within 1e-5."""
    a = _symmetric(n, rng, np.concatenate([np.linspace(-1, 1, n - 8), np.linspace(2, 9, 8)]))
    start = rng.normal(size=n).astype(np.float32)

    def ours(a: Any, start: Any) -> Any:
        return eigenpairs(lanczos(lambda v: a @ v, start, 64)).values[-6:]

    def theirs(a: Any, start: Any) -> Any:
        values = scipy.sparse.linalg.eigsh(
            a, 6, which="LA", v0=start, tol=1e-5, return_eigenvectors=False
        )
        return np.sort(values)

    return Case(f"{n} × {n}, 6 largest", (a, start), ours, "scipy", theirs, _largest)


def _conjugate_gradient(n: int, rng: np.random.Generator) -> Case:
    a = _symmetric(n, rng, np.geomspace(0.1, 10, n))
    return Case(
        f"{n} × {n}, condition 100", (a, rng.normal(size=n).astype(np.float32)),
        lambda a, b: cg(lambda v: a @ v, b)[0], "scipy",
        lambda a, b: scipy.sparse.linalg.cg(a, b, rtol=1e-5)[0], _largest,
    )  # fmt: skip


def _inverse_square_root(
    root: Callable[[Any, int], Any],
) -> Callable[[int, np.random.Generator], Case]:
    def case(n: int, rng: np.random.Generator) -> Case:
        return Case(
            f"{n} × {n}, condition 100", (_symmetric(n, rng, np.geomspace(0.1, 10, n)),),
            lambda a: root(a, 2), "scipy",
            lambda a: scipy.linalg.inv(scipy.linalg.sqrtm(a)), _largest,
        )  # fmt: skip

    return case


def _polar_factor(n: int, rng: np.random.Generator) -> Case:
    """In eight steps, which leave singular values above 1e-3 ‖X‖_F at 1."""
    x = _symmetric(n, rng, np.linspace(1, 2, n) * np.sign(rng.normal(size=n)))
    return Case(
        f"{n} × {n}", (x,), lambda x: polar_factor(x, polar_express(8)),
        "scipy", lambda x: scipy.linalg.polar(x)[0], _largest,
    )  # fmt: skip


def _hadamard(n: int, rng: np.random.Generator) -> Case:
    h = (scipy.linalg.hadamard(n) / math.sqrt(n)).astype(np.float32)
    x = rng.normal(size=(512, n)).astype(np.float32)
    return Case(f"512 rows of {n}", (x,), hadamard, "numpy", lambda x: x @ h, _largest)


def _sinkhorn(n: int, rng: np.random.Generator) -> Case:
    """The same number of steps with SciPy's logsumexp."""
    cost, steps = rng.uniform(size=(n, n)).astype(np.float32), 50

    def ours(cost: Any) -> Any:
        return sinkhorn(cost, epsilon=0.05, tolerance=1e-30, steps=steps).plan

    def theirs(cost: Any) -> Any:
        c, mass = cost / np.float32(0.05), np.float32(-math.log(n))
        g = np.zeros(n, np.float32)
        for _ in range(steps):
            f = mass - logsumexp(g - c, axis=1)
            g = mass - logsumexp(f[:, None] - c, axis=0)
        return np.exp(f[:, None] + g - c)

    return Case(f"{n} × {n}, {steps} steps", (cost,), ours, "scipy", theirs, _largest)


def _assignment(n: int, rng: np.random.Generator) -> Case:
    """Apart: the squared distances that the permutations pay."""
    x, y = (rng.normal(size=(n, 64)).astype(np.float32) for _ in range(2))

    def theirs(x: Any, y: Any) -> Any:
        cost = cdist(x, y, "sqeuclidean")
        return cost[linear_sum_assignment(cost)].sum()

    def ours(x: Any, y: Any) -> Any:
        return jnp.sum((x - align_neurons(x, y) @ y) ** 2)

    return Case(f"{n} neurons, 64 features", (x, y), ours, "scipy", theirs, _largest)


CASES: dict[str, Callable[[int, np.random.Generator], Case]] = {
    "kmeans": _kmeans,
    "randomized_svd": _randomized_svd,
    "randomized_eigh": _randomized_eigh,
    "pca": _pca,
    "lanczos": _lanczos,
    "cg": _conjugate_gradient,
    "inverse_root": _inverse_square_root(inverse_root),
    "newton_inverse_root": _inverse_square_root(newton_inverse_root),
    "polar_factor": _polar_factor,
    "hadamard": _hadamard,
    "sinkhorn": _sinkhorn,
    "align_neurons": _assignment,
}
