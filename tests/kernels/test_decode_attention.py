import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import aot
from kernels.decode_attention import KINDS, decode_attention, xla
from kernels.decode_attention.mosaic import splits
from kernels.decode_attention.reference import values
from kernels.decode_attention.shapes import WORKLOADS, workload
from kernels.packing import pack
from kernels.workload import shapes
from models import attention
from tests.kernels.suite import KernelSuite, close

WINDOWED, CAPPED = dict(window=70), dict(cap=5.0, scale=0.2)
FLOAT32 = dict(dtype="float32", tolerance=2e-6)


class TestDecodeAttention(KernelSuite):
    everywhere = {
        **{f"{kind}, float32": workload(3, 17, 6, 2, 24, kind, ragged=True, **FLOAT32)
           for kind in KINDS},
        "bfloat16": workload(2, 70, 4, 2, 16, "int8", ragged=True, tolerance=8e-3),
        "scales of each place, int8": workload(2, 9, 4, 4, 8, "int8", per_place=True, **FLOAT32),
        "scales of each place, int4": workload(2, 9, 4, 4, 8, "int4", per_place=True, **FLOAT32),
        "int4 of few channels": workload(2, 9, 4, 2, 6, "int4", **FLOAT32),
        "one place": workload(2, 1, 3, 1, 5, "int8", **FLOAT32),
        "window": workload(3, 200, 4, 2, 8, "fp8", ragged=True, **WINDOWED, **FLOAT32),
        "capped": workload(3, 40, 4, 2, 8, "int8", ragged=True, **CAPPED, **FLOAT32),
    }  # fmt: skip
    small = {
        **{f"{kind}, two blocks": workload(1, 104, 4, 1, 128, kind) for kind in KINDS},
        "int8, scales of each place": workload(1, 128, 4, 2, 64, "int8", per_place=True),
        "int4, scales of each place": workload(1, 64, 2, 1, 128, "int4", per_place=True),
        "three splits of different lengths": workload(3, 704, 2, 1, 64, "int8", ragged=True),
        "window": workload(2, 200, 2, 1, 64, "fp8", ragged=True, **WINDOWED),
        "capped": workload(1, 64, 2, 1, 64, "int8", **CAPPED),
        "more queries than eight": workload(1, 64, 9, 1, 64, "int8"),
    }
    real = WORKLOADS

    @pytest.mark.workloads("everywhere")
    def test_the_xla_form_of_a_gpu_agrees_with_float64(self, workload, monkeypatch):
        gpu = xla.dispatch.Device("cuda", "cuda", None)
        monkeypatch.setattr(xla.dispatch, "device", lambda: gpu)
        close(workload, "xla")

    @pytest.mark.aot
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_xla_form_holds_scores_and_no_copy_of_the_cache(self, kind):
        workload = WORKLOADS[f"8B, 32x8192, {kind}"]
        program = aot.compile(lambda *a: workload.run(*a, implementation="xla"), *shapes(workload))
        scores = 32 * 32 * 8192
        assert program.temporary <= scores * (4 + 2) + 2**22  # and probabilities in bfloat16


def problem(kind="int8", b=3, s=20, n=4, heads=2, h=16):
    return workload(b, s, n, heads, h, kind, dtype="float32").arguments(jax.random.key(0))


class TestMeaning:
    @pytest.mark.parametrize("implementation", ["reference", "xla"])
    @pytest.mark.parametrize("window, cap", [(None, None), (5, 3.0)])
    def test_it_is_the_models_attention_over_a_cache_of_rounded_values(
        self, implementation, window, cap
    ):
        q, k, v, _, k_scale, v_scale = problem()
        lengths = jnp.array([1, 9, 20])
        found = decode_attention(
            q, k, v, lengths, k_scale=k_scale, v_scale=v_scale, kind="int8", window=window, cap=cap,
            implementation=implementation,
        )  # fmt: skip
        k, v = (values(x, s, "int8", 16, jnp.float32) for x, s in ((k, k_scale), (v, v_scale)))
        with jax.default_matmul_precision("highest"):
            expected = attention.cached(
                q[:, None], k, v, lengths[:, None] - 1, window=window, cap=cap
            )
        np.testing.assert_allclose(found, expected[:, 0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
    def test_a_sequence_of_no_length_gives_zeros(self, implementation):
        q, k, v, _, k_scale, v_scale = problem(b=2, s=24, h=64)
        found = decode_attention(
            q.astype(jnp.bfloat16), k, v, jnp.array([0, 20]), k_scale=k_scale, v_scale=v_scale,
            kind="int8", implementation=implementation,
        )  # fmt: skip
        assert (found[0] == 0).all() and (found[1] != 0).all()

    @pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
    def test_what_lies_behind_the_end_or_before_the_window_changes_nothing(self, implementation):
        q, k, v, _, k_scale, v_scale = problem(b=1, s=144, h=64)

        def run(k, v):
            return decode_attention(
                q.astype(jnp.bfloat16), k, v, jnp.array([120]), k_scale=k_scale, v_scale=v_scale,
                kind="int8", window=30, implementation=implementation,
            )  # fmt: skip

        hidden = (jnp.arange(144) >= 120) | (jnp.arange(144) < 90)
        other = [jnp.where(hidden[None, :, None, None], 99, x).astype(x.dtype) for x in (k, v)]
        np.testing.assert_array_equal(run(k, v), run(*other))

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, interpreting
    @pytest.mark.parametrize(
        "implementation, kind",
        [("reference", "int4"), ("xla", "float"), ("interpret", "int4"), ("interpret", "fp8")],
    )
    def test_infinite_queries_show(self, implementation, kind):
        q, k, v, lengths, k_scale, v_scale = problem(kind, b=1, s=24, h=128)
        q = q.at[0, 0, 0].set(jnp.inf).astype(jnp.bfloat16)
        k, v = (x.astype(jnp.bfloat16) if kind == "float" else x for x in (k, v))
        found = decode_attention(
            q, k, v, lengths, k_scale=k_scale, v_scale=v_scale, kind=kind,
            implementation=implementation,
        )  # fmt: skip
        assert jnp.isnan(found[0, 0]).all() and jnp.isfinite(found[0, 1:]).all()

    @pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
    def test_scores_far_from_zero_do_not_overflow(self, implementation):
        q, k, v, lengths, _, v_scale = problem(b=1, s=72, h=64)
        found = decode_attention(
            (1000 * q).astype(jnp.bfloat16), k, v, lengths, k_scale=jnp.ones(1), v_scale=v_scale,
            kind="int8", implementation=implementation,
        )  # fmt: skip
        assert jnp.isfinite(found).all()

    def test_it_is_linear_in_values_and_their_scale(self):
        q, k, v, lengths, k_scale, v_scale = problem()
        run = lambda v_scale: decode_attention(  # noqa: E731
            q, k, v, lengths, k_scale=k_scale, v_scale=v_scale, kind="int8"
        )
        np.testing.assert_allclose(run(2 * v_scale), 2 * run(v_scale), rtol=1e-6)
        everywhere = jnp.broadcast_to(v_scale, v.shape[:3])
        np.testing.assert_allclose(run(everywhere), run(v_scale), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "b, s, heads, expected", [(1, 2048, 8, 8), (1, 8192, 8, 32), (32, 8192, 8, 4), (512, 64, 8, 1)]
)
def test_splits_fill_whole_waves_with_none_too_short(b, s, heads, expected):
    assert splits(b, s, heads) == expected


class TestRefusals:
    def refused(self, message, **changes):
        names = ("q", "k", "v", "lengths", "k_scale", "v_scale")
        arguments = dict(zip(names, problem(), strict=True)) | dict(kind="int8") | changes
        positional = [arguments.pop(name) for name in names[:4]]
        with pytest.raises(ValueError, match=message):
            decode_attention(*positional, **arguments)

    def test_of_kinds_and_shapes(self):
        q, k, v, *_ = problem()
        self.refused(r"kind='int3' is not one of int8, int4, fp8, float", kind="int3")
        self.refused(r"2 heads of k must divide those of q, q.shape=\(3, 3, 16\)", q=q[:, :3])
        self.refused(r"kind='int4' of q.shape=\(3, 4, 16\) needs k.shape\[-1\]=8, not 16",
                     kind="int4")  # fmt: skip
        self.refused(r"kind='fp8' needs k in float8_e4m3fn, not k.dtype=int8", kind="fp8")
        self.refused(r"kind='float' needs k in a floating type, not k.dtype=int8", kind="float")
        self.refused(r"window=0 must be positive", window=0)
        self.refused(r"cap=-1.0 must be positive", cap=-1.0)

    def test_of_what_the_kernel_does_not_take(self):
        interpret = dict(implementation="interpret")
        self.refused(r"decode_attention takes q, and k and v that are floats, in bfloat16, and "
                     r"q.dtype=float32", **interpret)  # fmt: skip
        q, k, v, *_ = problem()
        self.refused(r"takes h in multiples of 64 up to 256 for kind='int8', and h=16",
                     q=q.astype(jnp.bfloat16), **interpret)  # fmt: skip
        q, k, v, _, k_scale, v_scale = problem(h=64)
        self.refused(r"takes up to 64 queries to a key-value head for h=64, and q has 66",
                     q=jnp.zeros((3, 132, 64), jnp.bfloat16), k=k, v=v, **interpret)  # fmt: skip
        self.refused(r"takes S in multiples of 8, and S=20",
                     q=q.astype(jnp.bfloat16), k=k, v=v, **interpret)  # fmt: skip
        q, k, v, _, k_scale, v_scale = workload(3, 24, 4, 2, 64, "int8", per_place=True).arguments(
            jax.random.key(0)
        )
        self.refused(r"takes scales for each place with S in multiples of 64, and S=24",
                     q=q, k=k, v=v, k_scale=k_scale, v_scale=v_scale, **interpret)  # fmt: skip


def test_4_bit_codes_are_signed_and_two_to_a_byte_the_first_in_the_low_half():
    codes = jnp.arange(-8, 8, dtype=jnp.int8)[None]
    packed = pack(codes.astype(jnp.uint8) & 15, 4)
    assert packed[0, 0] == 0x98  # -8, then -7
    found = values(packed, jnp.ones(1), "int4", 16, jnp.float32)
    np.testing.assert_array_equal(found, codes.astype(float))
