import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from kernels import aot
from kernels.linear_cross_entropy import chunks
from kernels.linear_kl import linear_kl
from kernels.linear_kl.shapes import WORKLOADS, arguments
from kernels.workload import Cost, Workload
from tests.kernels.suite import LinearLossSuite, close, close_gradients

ANYWHERE = ["reference", "xla"]
KINDS = ["forward", "reverse", "jsd"]


def workload(t, ds, dt, v, kind, dtype="float32", *, spread=1.0, temperature=1.0, beta=0.5):
    def make(key):
        h_s, w_s, h_t, w_t = arguments(key, t, ds, dt, v, dtype)
        return h_s, w_s * jnp.asarray(spread, dtype), h_t, w_t * jnp.asarray(spread, dtype)

    run = functools.partial(linear_kl, kind=kind, temperature=temperature, beta=beta)
    return Workload(make, run, Cost(0, 0), tolerance=1e-5 if dtype == "float32" else 4e-3)


@pytest.fixture
def small_chunks(monkeypatch):
    """Of 256 entries, whatever the number of tokens."""
    monkeypatch.setattr(chunks, "ELEMENTS", 0)
    monkeypatch.setattr(chunks, "NARROWEST", 256)


class TestLinearKl(LinearLossSuite):
    by = (0, 1)
    everywhere = {
        **{f"{kind} {t}x{ds}x{dt}x{v}": workload(t, ds, dt, v, kind)
           for kind in KINDS for t, ds, dt, v in [(1, 1, 2, 1), (1, 8, 3, 5), (33, 17, 9, 257)]},
        **{f"{kind} warm": workload(9, 16, 8, 40, kind, temperature=3.0, beta=0.9)
           for kind in KINDS},
        **{f"{kind} bfloat16": workload(70, 40, 24, 300, kind, "bfloat16") for kind in KINDS},
        # Each excludes what the other is sure of.
        **{f"{kind}, logits of 30": workload(20, 16, 8, 33, kind, "bfloat16", spread=15.0)
           for kind in KINDS},
    }  # fmt: skip
    small = {
        "forward, odd tails": workload(136, 128, 8, 200, "forward", "bfloat16", temperature=2.0),
        "reverse, one token": workload(1, 8, 64, 40, "reverse", "bfloat16", spread=5.0),
        "jsd, two groups of tokens": workload(264, 8, 16, 192, "jsd", "bfloat16", beta=0.2),
    }
    real = WORKLOADS

    @pytest.mark.parametrize(
        "implementation, kind", [*(("xla", kind) for kind in KINDS), ("interpret", "forward")]
    )
    def test_chunks_of_the_vocabulary_give_what_all_of_it_gives(
        self, small_chunks, implementation, kind
    ):
        dtype = "bfloat16" if implementation == "interpret" else "float32"
        case = workload(6, 8, 16, 256 + 8, kind, dtype)
        if implementation == "xla":
            close(case, implementation)
        close_gradients(case, implementation, self.by)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("implementation", ANYWHERE)
    @pytest.mark.some(2)
    def test_logits_of_10000_are_no_overflow(self, implementation, kind):
        """Where float32 places a logit within 0.001, and the slope is a difference of two."""
        case = workload(20, 16, 8, 33, kind, "bfloat16", spread=5000.0)
        close(case, implementation)
        arrays = case.arguments(jax.random.key(0))
        by_h = jax.jit(
            jax.grad(lambda h, *a: case.run(h, *a, implementation=implementation).sum())
        )(*arrays)
        assert jnp.isfinite(by_h).all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_it_is_0_for_a_student_that_is_the_teacher_and_so_is_its_gradient(
        self, implementation, kind
    ):
        h, w, _, _ = arguments(jax.random.key(0), 7, 8, 8, 50, "float32")

        def total(h_s):
            return linear_kl(h_s, w, h, w, kind=kind, implementation=implementation).sum()

        value, by_h = jax.value_and_grad(total)(h)
        assert abs(value) < 1e-5 and jnp.abs(by_h).max() < 1e-6

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_jsd_is_at_most_the_entropy_of_its_shares_and_kl_is_not(self, implementation):
        """0 ≤ JSD(β) ≤ -β log β - (1 - β) log(1 - β), however far apart the two are."""
        arrays = workload(50, 16, 8, 64, "jsd", spread=30.0).arguments(jax.random.key(1))
        of = functools.partial(linear_kl, *arrays, beta=0.3, implementation=implementation)
        bound = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
        jsd = of(kind="jsd")
        assert jsd.min() >= 0 and jsd.max() <= bound + 1e-5
        assert of(kind="forward").max() > bound and of(kind="reverse").max() > bound

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_forward_and_reverse_are_each_other_with_the_roles_swapped(self, implementation):
        h_s, w_s, h_t, w_t = arguments(jax.random.key(2), 9, 8, 4, 30, "float32")
        forward = linear_kl(h_s, w_s, h_t, w_t, kind="forward", implementation=implementation)
        reverse = linear_kl(h_t, w_t, h_s, w_s, kind="reverse", implementation=implementation)
        np.testing.assert_allclose(forward, reverse, rtol=1e-5)

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_jsd_with_a_small_beta_is_beta_times_the_forward_kl(self, implementation):
        """The GKD paper's limit: JSD(β) / β → KL(teacher ‖ student)."""
        arrays = arguments(jax.random.key(3), 9, 8, 8, 30, "bfloat16")
        beta = 1e-4
        jsd = linear_kl(*arrays, kind="jsd", beta=beta, implementation=implementation)
        forward = linear_kl(*arrays, kind="forward", implementation="reference")
        np.testing.assert_allclose(jsd / beta, forward, rtol=0.02)

    @pytest.mark.parametrize("implementation", ANYWHERE)
    def test_the_teacher_is_not_differentiated(self, implementation):
        arrays = arguments(jax.random.key(4), 5, 8, 8, 30, "float32")
        by = jax.grad(lambda *a: linear_kl(*a, implementation=implementation).sum(), (0, 1, 2, 3))(
            *arrays
        )
        assert all(jnp.abs(x).max() > 0 for x in by[:2])
        assert all((x == 0).all() for x in by[2:])

    def test_the_kernels_do_not_race(self):
        """Two tiles to a block, each written in an odd number of pieces."""
        arrays = arguments(jax.random.key(5), 16, 64, 8, 200, "bfloat16")
        loss = functools.partial(linear_kl, kind="jsd", implementation="interpret")
        jax.block_until_ready(
            jax.jit(jax.grad(lambda h_s: loss(h_s, *arrays[1:]).sum()))(arrays[0])
        )
        assert not gpu_callbacks.get_races().races_found

    @pytest.mark.aot
    def test_the_kernels_of_the_reverse_kl_compile_for_an_h200_without_spills(self):
        arrays = jax.eval_shape(lambda: arguments(jax.random.key(0), 4096, 576, 960, 49152))

        def total(h_s, *others):
            return linear_kl(h_s, *others, kind="reverse", implementation="mosaic").sum()

        program = aot.compile(jax.grad(total), *arrays)
        assert len(program.kernels) == 2
        assert all(kernel.spilled == 0 for kernel in program.kernels), program.kernels


def test_what_does_not_fit_is_refused():
    h_s, w_s, h_t, w_t = jnp.ones((3, 8)), jnp.ones((5, 8)), jnp.ones((3, 4)), jnp.ones((5, 4))
    with pytest.raises(ValueError, match="h_s and w_s must have the same last dimension"):
        linear_kl(h_s, w_s[:, :4], h_t, w_t)
    with pytest.raises(ValueError, match="h_t and w_t must have the same last dimension"):
        linear_kl(h_s, w_s, h_t, w_t[:, :2])
    with pytest.raises(ValueError, match="h_s and h_t must have the same tokens"):
        linear_kl(h_s, w_s, h_t[:2], w_t)
    with pytest.raises(ValueError, match="w_s and w_t must have the same vocabulary"):
        linear_kl(h_s, w_s, h_t, w_t[:4])
    with pytest.raises(ValueError, match="w_s must have a row for each entry"):
        linear_kl(h_s, w_s[:0], h_t, w_t[:0])
    with pytest.raises(ValueError, match="kind='js' is not one of forward, reverse, jsd"):
        linear_kl(h_s, w_s, h_t, w_t, kind="js")
    with pytest.raises(ValueError, match="temperature=0.0 must be positive"):
        linear_kl(h_s, w_s, h_t, w_t, temperature=0.0)
    with pytest.raises(ValueError, match="beta=1.0 must lie between 0 and 1"):
        linear_kl(h_s, w_s, h_t, w_t, kind="jsd", beta=1.0)
    b = [x.astype("bfloat16") for x in (h_s, w_s, h_t, w_t)]
    with pytest.raises(ValueError, match="takes bfloat16, and h_t and w_t are float32"):
        linear_kl(*b[:2], h_t, w_t, implementation="interpret")
    with pytest.raises(ValueError, match="takes D in multiples of 8, and D=4"):
        linear_kl(*b, implementation="interpret")
