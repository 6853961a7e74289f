"""GPTQ against a port of the official code, its theory, and rounding.

The deviations are those of papers/gptq.md.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.quantization.gptq import quantize_weight
from algorithms.tensors import QuantizedTensor
from tests.algorithms.integers import gptq, gptq_config, rtn
from tests.algorithms.quantization import gptq_official as official

# Name: our options, then the official code's. Block sizes differ on purpose: 12 or less against
# 128, so lazy updates are tested too; where ranges come from current weights, the official block is
# a divisor of the group (deviation 1).
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "row": (
        dict(group_size=None, activation_order=False, block_size=16),
        dict(blocksize=128),
    ),
    "row, ordered": (
        dict(group_size=None, activation_order=True, block_size=7),
        dict(blocksize=20, actorder=True),
    ),
    "current groups": (
        dict(group_size=12, activation_order=False, static_groups=False, block_size=5),
        dict(groupsize=12, blocksize=6),
    ),
    "static groups": (
        dict(group_size=12, activation_order=False, static_groups=True, block_size=48),
        dict(groupsize=12, static_groups=True),
    ),
    "static groups, ordered": (
        dict(group_size=12, activation_order=True, static_groups=True, block_size=1),
        dict(groupsize=12, static_groups=True, actorder=True),
    ),
    "one group, ordered": (
        dict(group_size=48, activation_order=True, static_groups=True, block_size=12),
        dict(groupsize=48, static_groups=True, actorder=True),
    ),
}


def layer(seed=0, o=7, i=48, n=96, rank=None):
    """W [o, i] and correlated inputs X [n, i].

    Every group of 12 has negative weights (deviation 2) and its largest magnitude is positive: at
    minus the largest, w / scale is a tie that the last bit decides (deviation 5).
    """
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(o, i))
    w[:, ::12] = -np.abs(w[:, ::12])
    w[:, 3::12] = 1.5 * np.abs(w.reshape(o, -1, 12)).max(2)
    rank = i if rank is None else rank
    x = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, i)) * np.exp(rng.normal(size=i) / 2)
    return w, x


def ours(w, h, **options):
    """GPTQ with unrounded scales unless options say otherwise."""
    config = gptq_config(**{"scale_dtype": None} | options)
    return quantize_weight(jnp.asarray(w), jnp.asarray(h), config)


def compress(method, w, x) -> QuantizedTensor:
    """What a method makes of float32 W and X, with the data observed if it wants any."""
    stats = None
    if method.observe is not None:
        stats = method.observe(method.init(x.shape[1]), jnp.asarray(x, jnp.float32))
    return method.compress(jnp.asarray(w, jnp.float32), stats)


def assert_same(tensor, expected):
    np.testing.assert_array_equal(tensor.codes(), expected.codes)
    np.testing.assert_allclose(tensor.scale, expected.scale, rtol=1e-12)
    np.testing.assert_array_equal(tensor.zero_point(), expected.zero)
    np.testing.assert_allclose(tensor.dequantize(), expected.q, atol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.some(14)
def test_equals_the_official_code(x64, layout, bits, symmetric):
    w, x = layer(bits)
    h = official.hessian(x)
    mine, theirs = LAYOUTS[layout]
    expected = official.fasterquant(w, h, bits=bits, sym=symmetric, **theirs)
    assert_same(ours(w, h, bits=bits, symmetric=symmetric, **mine), expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.some(4)
def test_search_by_weights_is_the_official_mse_option(x64, layout, symmetric):
    w, x = layer(1)
    h = official.hessian(x)
    mine, theirs = LAYOUTS[layout]
    expected = official.fasterquant(w, h, bits=3, sym=symmetric, mse=True, **theirs)
    assert_same(ours(w, h, bits=3, symmetric=symmetric, search="weights", **mine), expected)


@pytest.mark.parametrize("damping", [1e-4, 0.05, 1.0])
@pytest.mark.parametrize("layout", ["current groups", "static groups, ordered"])
@pytest.mark.some(2)
def test_equals_the_official_code_at_every_damping(x64, layout, damping):
    w, x = layer(2)
    h = official.hessian(x)
    mine, theirs = LAYOUTS[layout]
    expected = official.fasterquant(w, h, bits=4, sym=False, percdamp=damping, **theirs)
    assert_same(ours(w, h, bits=4, symmetric=False, damping=damping, **mine), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_official_code_with_dead_inputs(x64, layout):
    w, x = layer(3)
    dead = [0, 13, 47]
    x[:, dead] = 0
    w[:, dead] = 0.1  # within every row's range: deviation 3 is tested on its own
    h = official.hessian(x)
    mine, theirs = LAYOUTS[layout]
    expected = official.fasterquant(w, h, bits=4, sym=False, **theirs)
    tensor = ours(w, h, bits=4, symmetric=False, **mine)
    assert_same(tensor, expected)
    assert not np.asarray(tensor.dequantize())[:, dead].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.some(2)
def test_deviation_5_ties_at_minus_the_largest_magnitude_are_worth_the_same(x64, layout):
    """-(2^bits - 1)/2 scales lie between codes 0 and 1: either is as near, rounding decides."""
    w = np.full((1, 48), -1.0)
    h = np.eye(48)
    mine, theirs = LAYOUTS[layout]
    expected = official.fasterquant(w, h, bits=4, sym=True, **theirs)
    tensor = ours(w, h, bits=4, symmetric=True, **mine)
    for codes in (np.asarray(tensor.codes()), expected.codes):
        assert set(codes.ravel().tolist()) <= {0, 1}
    for dense in (tensor.dequantize(), expected.q):
        np.testing.assert_allclose(np.abs(w - dense), expected.scale[0, 0] / 2, rtol=1e-12)


@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_official_code_on_rows_of_zeros(x64, symmetric):
    w, x = layer(4)
    w[2], w[3, 12:24] = 0, 0
    h = official.hessian(x)
    mine, theirs = LAYOUTS["static groups, ordered"]
    expected = official.fasterquant(w, h, bits=4, sym=symmetric, **theirs)
    assert_same(ours(w, h, bits=4, symmetric=symmetric, **mine), expected)


def test_the_official_loss_is_the_output_error_of_its_result():
    """Of the oracle: Σ (w - q)² / (2 d²) is half the damped error tr(ΔW H ΔWᵀ), in any order."""
    w, x = layer(5)
    h = official.hessian(x)
    for layout in LAYOUTS.values():
        result = official.fasterquant(w, h, bits=3, sym=False, **layout[1])
        damped, d = h + 0.01 * np.diag(h).mean() * np.eye(48), w - result.q
        np.testing.assert_allclose(result.loss, np.sum(d @ damped * d) / 2, rtol=1e-9)


def test_deviation_1_ranges_come_from_current_weights(x64):
    w, x = layer(6)
    h = official.hessian(x)
    lagging = official.fasterquant(w, h, bits=3, sym=False, groupsize=12, blocksize=48)
    current = official.fasterquant(w, h, bits=3, sym=False, groupsize=12, blocksize=12)
    assert (lagging.scale[:, 0] == current.scale[:, 0]).all()  # the first group has nothing to miss
    assert (lagging.scale[:, 1:] != current.scale[:, 1:]).any()
    options = dict(bits=3, group_size=12, activation_order=False, static_groups=False)
    assert_same(ours(w, h, block_size=48, **options), current)


def test_deviation_2_symmetric_ranges_of_rows_without_negative_weights(x64):
    w, x = layer(7)
    w = np.abs(w)
    h = np.diag(np.diag(official.hessian(x)))  # diagonal: nothing but rounding
    theirs = official.fasterquant(w, h, bits=4, sym=True)
    tensor = ours(w, h, bits=4, symmetric=True, group_size=None)
    np.testing.assert_allclose(tensor.scale, 2 * theirs.scale, rtol=1e-12)
    clipped = w > 7.5 * theirs.scale
    assert clipped.any() and (theirs.codes[clipped] == 15).all()
    assert np.abs(w - tensor.dequantize()).max() < np.abs(w - theirs.q).max() / 2


def test_deviation_3_dead_weights_do_not_widen_a_row(x64):
    w, x = layer(8)
    x[:, 5], w[:, 5] = 0, 100
    h = official.hessian(x)
    theirs = official.fasterquant(w, h, bits=4, sym=False)
    w[:, 5] = 0
    cleared = official.fasterquant(w, h, bits=4, sym=False)
    w[:, 5] = 100
    tensor = ours(w, h, bits=4, group_size=None, activation_order=False)
    assert_same(tensor, cleared)
    assert (np.asarray(tensor.scale) < theirs.scale / 10).all()


def test_deviation_4_equal_diagonals_keep_their_order(x64):
    w, _ = layer(9)
    h = np.full((48, 48), 0.5) + np.eye(48)
    mine, theirs = LAYOUTS["static groups, ordered"]
    expected = official.fasterquant(w, h, bits=4, sym=False, **theirs | dict(actorder=False))
    assert_same(ours(w, h, bits=4, symmetric=False, **mine), expected)


def test_the_scale_of_the_hessian_does_not_matter(x64):
    w, x = layer(10)
    h = official.hessian(x)
    first, second = (ours(w, scale * h, group_size=12) for scale in (1, len(x) / 2))
    np.testing.assert_array_equal(first.codes(), second.codes())


def test_deviation_7_with_dead_inputs_it_matters_as_little_as_they_are_few(x64):
    """Dead diagonals become 1 whatever H's scale, and count in λ's mean: in a sum they vanish."""
    w, x = layer(10)
    x[:, [7, 20]] = 0
    h = official.hessian(x)
    layout: dict[str, Any] = dict(groupsize=12, static_groups=True, actorder=True)
    live = np.mean(np.diag(h)[np.diag(h) > 0])
    lam = 0.01 * (46 * live * np.array([1, len(x) / 2]) + 2) / 48
    np.testing.assert_allclose(lam[1] / lam[0], len(x) / 2, rtol=0.05)
    for scale in (1, len(x) / 2):
        expected = official.fasterquant(w, scale * h, bits=4, sym=False, **layout)
        assert_same(ours(w, scale * h, group_size=12), expected)


@pytest.mark.parametrize("order", [False, True])
def test_a_diagonal_hessian_gives_plain_rounding(order):
    w, x = layer(11)
    h = np.diag(np.diag(official.hessian(x))).astype(np.float32)
    tensor = ours(w.astype(np.float32), h, group_size=12, activation_order=order)
    plain = compress(rtn(group_size=12, scale_dtype=None), w, x)
    np.testing.assert_array_equal(tensor.codes(), plain.codes())
    np.testing.assert_array_equal(tensor.scale, plain.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.some(2)
def test_trades_weight_error_for_output_error(bits, order):
    """Against rounding on the same static grid: farther from W, nearer to W X."""
    w, x = layer(bits, o=16, rank=24)
    tensor = compress(gptq(bits=bits, group_size=12, activation_order=order), w, x)
    plain = compress(rtn(bits=bits, group_size=12), w, x)
    np.testing.assert_array_equal(tensor.scale, plain.scale)

    far, near = (np.asarray(t.dequantize(), np.float64) - w for t in (tensor, plain))
    assert np.sum(far**2) > np.sum(near**2)
    assert np.sum((far @ x.T) ** 2) < 0.5 * np.sum((near @ x.T) ** 2)


def test_observing_in_pieces_is_observing_at_once(x64):
    _, x = layer(12)
    init, observe, *_ = gptq()
    assert init is not None and observe is not None
    whole = observe(init(48), jnp.asarray(x))
    pieces = init(48)
    for piece in np.split(x, [1, 40]):
        pieces = observe(pieces, jnp.asarray(piece))
    # Sums in another order differ by up to n ε Σ|x||x|, whatever is left after cancellation.
    bound = len(x) * np.finfo(float).eps * (np.abs(x).T @ np.abs(x))
    assert (np.abs(pieces.gram - whole.gram) <= bound).all()
    assert (np.abs(whole.gram - x.T @ x) <= bound).all()


@pytest.mark.parametrize("layout", ["current groups", "static groups, ordered"])
def test_jit_equals_eager(x64, layout):
    w, x = layer(13)
    h = official.hessian(x)
    config = gptq_config(**LAYOUTS[layout][0])
    eager = quantize_weight(jnp.asarray(w), jnp.asarray(h), config)
    compiled = jax.jit(quantize_weight, static_argnames="config")
    jitted = compiled(jnp.asarray(w), jnp.asarray(h), config)
    np.testing.assert_array_equal(eager.codes(), jitted.codes())
    np.testing.assert_array_equal(eager.scale, jitted.scale)


@pytest.mark.parametrize("layout", ["current groups", "static groups, ordered"])
def test_vmap_over_layers_equals_the_loop(x64, layout):
    layers = [layer(seed) for seed in (14, 15, 16)]
    w = np.stack([w for w, _ in layers])
    h = np.stack([official.hessian(x) for _, x in layers])
    options = LAYOUTS[layout][0]
    batched = jax.vmap(lambda w, h: ours(w, h, **options).codes())(w, h)
    for n in range(3):
        np.testing.assert_array_equal(batched[n], ours(w[n], h[n], **options).codes())


def equations(jaxpr):
    """The number of equations of a traced graph, those inside its loops and calls included."""
    inner = (
        p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()), is_leaf=_graph)
    )
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner if _graph(p))


def _graph(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_graph_does_not_grow_with_width(layout):
    def size(i):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, i), (i, i))]
        return equations(jax.make_jaxpr(lambda w, h: ours(w, h, **options))(*shapes).jaxpr)

    options = LAYOUTS[layout][0] | dict(block_size=12, search="weights")
    if options["group_size"] is not None:
        options["group_size"] = 12
    assert size(480) == size(48) < 1000


def test_finite_on_dead_inputs_and_dead_layers():
    w, x = layer(17)
    x[:, 7] = 0
    for inputs in (x, np.zeros_like(x)):
        h = jnp.asarray(official.hessian(inputs), jnp.float32)
        tensor = ours(w.astype(np.float32), h, group_size=12)
        assert jnp.isfinite(tensor.dequantize()).all()
        assert not np.asarray(tensor.dequantize())[:, 7].any()


def test_a_hessian_that_is_not_positive_definite_gives_nan_and_damping_mends_it():
    """Deviation 8: rounding in silence would hide it; the walk turns NaN into a sentence."""
    w, _ = layer(18)
    h = np.ones((48, 48), np.float32)  # of rank one, exactly
    assert jnp.isnan(ours(w.astype(np.float32), h, group_size=12, damping=0.0).scale).all()
    assert jnp.isfinite(ours(w.astype(np.float32), h, group_size=12).dequantize()).all()


def test_deviation_6_scales_are_rounded_before_codes_are_chosen():
    """The grid that is stored is the grid that GPTQ compensates for."""
    w, x = layer(19)
    h = jnp.asarray(official.hessian(x), jnp.float32)
    half = ours(w.astype(np.float32), h, group_size=12, scale_dtype="float16")
    full = ours(w.astype(np.float32), h, group_size=12)
    assert half.scale.dtype == jnp.float16
    np.testing.assert_array_equal(half.scale, full.scale.astype(jnp.float16))


@pytest.mark.parametrize("bits", [2, 4])
def test_keeps_shape_and_dtypes(bits):
    w, x = layer(20)
    tensor = compress(gptq(bits=bits, group_size=24), w, x)
    tensor.validate()
    assert (tensor.shape, tensor.bits, tensor.group_size) == ((7, 48), bits, 24)
    assert tensor.codes().dtype == tensor.zero_point().dtype == jnp.uint8
    assert tensor.dequantize().dtype == jnp.float32
    assert int(tensor.codes().max()) < 2**bits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=1), "bits=1 must be from 2 to 8"),
        (dict(bits=9), "bits=9 must be from 2 to 8"),
        (dict(group_size=0), "group_size=0 must be positive"),
        (dict(group_size=12, static_groups=False), "needs static_groups=True"),
        (dict(damping=-0.1), "damping=-0.1 must not be negative"),
        (dict(block_size=0), "block_size=0 must be positive"),
    ],
)
def test_refuses_settings_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        gptq(**options)


def test_refuses_groups_that_do_not_divide():
    sentence = r"group_size=48 must divide the input dimension of w, w.shape=\(4, 128\)"
    with pytest.raises(ValueError, match=sentence):
        quantize_weight(jnp.ones((4, 128)), jnp.eye(128), gptq_config(group_size=48))


def test_row_groups_may_be_ordered_without_static_groups():
    method = gptq(group_size=None, activation_order=True, static_groups=False)
    assert method.observe is not None
