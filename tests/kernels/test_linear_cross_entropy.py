import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from kernels import aot
from kernels.linear_cross_entropy import (
    IMPLEMENTATIONS,
    chunks,
    linear_cross_entropy,
    linear_cross_entropy_and_logsumexp,
    tiles,
)
from kernels.linear_cross_entropy.shapes import WORKLOADS, arguments
from kernels.workload import Cost, Workload, shapes
from tests.kernels.suite import LinearLossSuite, distance

ANYWHERE = ["reference", "xla"]


def workload(t, d, v, dtype="float32", *, spread=1.0, cap=None, ignored=0.3, y=None):
    def make(key):
        h, w, labels = arguments(key, t, d, v, dtype, ignored)
        return h, w * jnp.asarray(spread, dtype), labels if y is None else jnp.asarray(y)

    run = functools.partial(linear_cross_entropy, cap=cap)
    return Workload(make, run, Cost(0, 0), tolerance=1e-5 if dtype == "float32" else 4e-3)


@pytest.fixture
def small_chunks(monkeypatch):
    """Of 256 entries, whatever the number of tokens."""
    monkeypatch.setattr(chunks, "ELEMENTS", 0)
    monkeypatch.setattr(chunks, "NARROWEST", 256)


def gradients(loss, h, w):
    """Of a sum in which no two tokens weigh the same."""
    return jax.grad(lambda h, w: (loss(h, w) * (1 + jnp.arange(h.shape[0]))).sum(), (0, 1))(h, w)


class TestLinearCrossEntropy(LinearLossSuite):
    by = (0, 1)
    everywhere = {
        **{f"{t}x{d}x{v}": workload(t, d, v)
           for t, d, v in [(1, 1, 1), (1, 8, 5), (5, 3, 7), (33, 17, 257), (2, 64, 1000)]},
        "bfloat16": workload(70, 40, 300, "bfloat16"),
        "float16": workload(70, 40, 300, "float16"),
        "capped": workload(20, 16, 90, spread=20, cap=30.0),
        "capped bfloat16": workload(20, 16, 90, "bfloat16", spread=20, cap=30.0),
        "all ignored": workload(9, 16, 33, ignored=1.1),
        "none ignored": workload(9, 16, 33, ignored=0.0),
        "logits of 10000": workload(40, 16, 65, spread=5000.0),
        "logits of 10000, bfloat16": workload(40, 16, 65, "bfloat16", spread=5000.0),
        "one label": workload(17, 8, 31, y=[30] * 17),
    }  # fmt: skip
    small = {
        "one token, logits of 10000": workload(1, 64, 40, "bfloat16", spread=5000.0, ignored=0.0),
        "odd tails, two tiles, two steps": workload(136, 128, 304, "bfloat16"),
        "two groups of tokens, capped": workload(264, 8, 256, "bfloat16", spread=9, cap=20.0),
        "more steps than stages": workload(128, 384, 40, "bfloat16", ignored=1.1),
    }
    real = WORKLOADS

    @pytest.mark.parametrize(
        "implementation, cap", [("xla", None), ("xla", 4.0), ("interpret", 4.0)]
    )
    @pytest.mark.some(1)
    def test_chunks_of_the_vocabulary_give_what_all_of_it_gives(
        self, small_chunks, implementation, cap
    ):
        dtype = "bfloat16" if implementation == "interpret" else "float32"
        h, w, y = arguments(jax.random.key(0), 6, 8, 2 * 256 + 8, dtype)
        y = y.at[:3].set([0, 256, 520])  # in each of the chunks
        loss = functools.partial(linear_cross_entropy, y=y, cap=cap)
        found = functools.partial(loss, implementation=implementation)
        expected = functools.partial(loss, implementation="reference")
        h32, w32 = h.astype("float32"), w.astype("float32")
        tolerance = 1e-5 if dtype == "float32" else 4e-3
        assert distance(jax.jit(found)(h, w), expected(h32, w32)) < tolerance
        ours = jax.jit(functools.partial(gradients, found))(h, w)
        for mine, exact in zip(ours, gradients(expected, h32, w32), strict=True):
            assert distance(mine, exact) < 2 * tolerance

    @pytest.mark.parametrize("implementation", [*ANYWHERE, "interpret"])
    def test_logsumexp_has_gradients_too(self, implementation):
        h, w, y = arguments(jax.random.key(1), 6, 8, 40, "bfloat16")

        def penalty(h, w, implementation):
            return linear_cross_entropy_and_logsumexp(h, w, y, implementation=implementation)[1]

        ours = jax.jit(
            lambda h, w: gradients(lambda h, w: penalty(h, w, implementation) ** 2, h, w)
        )(h, w)
        exact = gradients(
            lambda h, w: jax.nn.logsumexp(h @ w.T, axis=1) ** 2,
            h.astype("float32"),
            w.astype("float32"),
        )
        for mine, expected in zip(ours, exact, strict=True):
            assert distance(mine, expected) < 8e-3

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_a_label_that_is_none_is_nan_and_an_ignored_one_is_0(self, implementation):
        h, w, _ = arguments(jax.random.key(1), 5, 8, 40, "bfloat16")
        y = jnp.asarray([0, 40, -1, 7, 39])
        loss = jax.jit(
            lambda h, w: linear_cross_entropy(h, w, y, ignore=7, implementation=implementation)
        )(h, w)
        np.testing.assert_array_equal(jnp.isnan(loss), [False, True, True, False, False])
        assert loss[3] == 0

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # interpreted
    @pytest.mark.parametrize("implementation", [*ANYWHERE, "interpret"])
    def test_what_is_not_finite_stays_in_its_token(self, implementation):
        h, w, _ = arguments(jax.random.key(1), 4, 8, 40, "bfloat16")
        h = h.at[1, 2].set(jnp.nan)
        w = w.at[3].set(jnp.abs(w[3]))
        h = h.at[2].set(jnp.inf)  # its logits: infinite, some of them NaN
        y = jnp.zeros(4, jnp.int32)
        loss = jax.jit(lambda h, w: linear_cross_entropy(h, w, y, implementation=implementation))(
            h, w
        )
        np.testing.assert_array_equal(jnp.isfinite(loss), [True, False, False, True])

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_an_infinite_logit_of_another_entry_is_an_infinite_loss(self, implementation):
        h, w = jnp.ones((2, 1)), jnp.asarray([[1.0], [2.0], [3.0]]).at[1].set(jnp.inf)
        y = jnp.asarray([0, 1])
        loss = linear_cross_entropy(h, w, y, implementation=implementation)
        assert loss[0] == jnp.inf and jnp.isnan(loss[1])

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_adding_to_every_logit_changes_nothing(self, implementation):
        h, w, y = arguments(jax.random.key(2), 8, 16, 50, "bfloat16", ignored=0.0)
        ones = jnp.ones((1, 1), "bfloat16")
        h = jnp.pad(h, ((0, 0), (0, 8))).at[:, 16].set(1)  # with a column for the shift
        w = jnp.pad(w, ((0, 0), (0, 8)))
        moved = w.at[:, 16].set(ones[0, 0] * 64)
        loss = jax.jit(lambda w: linear_cross_entropy(h, w, y, implementation=implementation))
        np.testing.assert_allclose(loss(moved), loss(w), atol=2e-5)

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_gradients_by_the_logits_sum_to_nothing(self, implementation):
        """Σ_v ∂loss/∂l_v = 0: with h = 1, Σ_v ∂loss/∂w_v is that sum."""
        _, w, y = arguments(jax.random.key(3), 8, 16, 50, "bfloat16", ignored=0.0)
        h = jnp.ones((8, 16), "bfloat16")
        by_w = jax.jit(jax.grad(
            lambda w: linear_cross_entropy(h, w, y, implementation=implementation).sum()
        ))(w)  # fmt: skip
        total = by_w.astype("float32").sum(axis=0)
        assert jnp.abs(total).max() < 0.02 * jnp.abs(by_w).max()

    def test_the_kernels_do_not_race(self):
        h, w, y = arguments(jax.random.key(1), 200, 384, 32, "bfloat16")
        loss = functools.partial(linear_cross_entropy, y=y, implementation="interpret")
        jax.block_until_ready(jax.jit(loss)(h, w))
        assert not gpu_callbacks.get_races().races_found
        jax.block_until_ready(jax.jit(jax.grad(lambda h: loss(h, w).sum()))(h))
        assert not gpu_callbacks.get_races().races_found

    @pytest.mark.aot
    def test_the_capped_kernels_compile_for_an_h200_without_spills(self):
        arrays = jax.eval_shape(lambda: arguments(jax.random.key(0), 4096, 576, 49152))

        def run(h, w, y):
            return gradients(
                functools.partial(linear_cross_entropy, y=y, cap=30.0, implementation="mosaic"),
                h,
                w,
            )

        program = aot.compile(run, *arrays)
        assert len(program.kernels) == 2
        assert all(kernel.spilled == 0 for kernel in program.kernels), program.kernels


@pytest.mark.parametrize("tokens, vocabulary", [(1, 1), (256, 256), (8192, 128256), (300, 49152)])
def test_the_schedule_covers_each_tile_once(tokens, vocabulary):
    plan = tiles.schedule(tokens, vocabulary, 256, tiles.SMS)
    seen = np.zeros((plan.groups, plan.tiles), int)
    for cluster in range(plan.clusters):
        for n in range(int(plan.count(cluster))):
            group, _, first, last = (int(x) for x in plan.at(cluster + n * plan.clusters))
            assert first < last
            seen[group, first:last] += 1
    assert (seen == 1).all()


def test_the_schedule_keeps_an_h200_busy():
    """At least 95 % of its blocks' time at the shapes that it is for, forward."""
    for workload in WORKLOADS.values():
        h, w, _ = shapes(workload)
        plan = tiles.schedule(h.shape[0], w.shape[0], 256, tiles.SMS)
        longest = -(-plan.groups * plan.ranges // plan.clusters) * -(-plan.tiles // plan.ranges)
        assert plan.groups * plan.tiles >= 0.95 * longest * tiles.SMS // tiles.CLUSTER


def test_what_does_not_fit_is_refused():
    h, w, y = jnp.ones((3, 8)), jnp.ones((5, 8)), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="h and w must have the same last dimension"):
        linear_cross_entropy(h, w[:, :4], y)
    with pytest.raises(ValueError, match="y must have a label for each token"):
        linear_cross_entropy(h, w, y[:2])
    with pytest.raises(ValueError, match="w must have a row for each entry of the vocabulary"):
        linear_cross_entropy(h, w[:0], y)
    with pytest.raises(ValueError, match="cap=0.0 must be positive, or None"):
        linear_cross_entropy(h, w, y, cap=0.0)
    with pytest.raises(ValueError, match="takes bfloat16, and h and w are float32 and float32"):
        linear_cross_entropy(h, w, y, implementation="interpret")
    h, w = h.astype("bfloat16"), w.astype("bfloat16")
    with pytest.raises(ValueError, match="takes D in multiples of 8, and D=4"):
        linear_cross_entropy(h[:, :4], w[:, :4], y, implementation="interpret")
    for name, (t, d, v) in {"D": (8, 72, 40), "T": (9, 8, 40), "V": (8, 8, 41)}.items():
        cut = arguments(jax.random.key(0), t, d, v, "bfloat16")
        with pytest.raises(ValueError, match=f"takes {name} up to (8|64) or in multiples of it"):
            linear_cross_entropy(*cut, implementation="interpret")
    with pytest.raises(ValueError, match="needs an NVIDIA GPU of compute capability 9.0"):
        linear_cross_entropy(h, w, y, implementation="mosaic")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_have_no_losses(implementation):
    if implementation != "mosaic":
        empty = linear_cross_entropy(
            jnp.ones((0, 8)), jnp.ones((5, 8)), jnp.zeros(0, int), implementation=implementation
        )
        assert empty.shape == (0,)
