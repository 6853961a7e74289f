"""Asymmetric calibration against a port of the official code, its theory, and methods without it.

The deviations are those of papers/gptaq.md.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.quantization.gptaq import aim, gptaq
from experiments import compress, evaluate
from experiments.errors import UserError
from tests.algorithms.integers import gptq, rtn
from tests.algorithms.quantization import gptaq_official as official
from tests.algorithms.quantization import gptq_official
from tests.experiments import tiny


def layer(seed=0, o=12, i=32, n=400, apart=0.4):
    """W [o, i], what the layer reads and what it reads in the original model, [n, i] each.

    They differ by noise and by what is linear in the other channels, as after compressed layers.
    """
    rng = np.random.default_rng(seed)
    original = rng.normal(size=(n, i)) @ rng.normal(size=(i, i)) / np.sqrt(i)
    moved = original @ rng.normal(size=(i, i)) / np.sqrt(i)
    x = original + apart * (moved + 0.5 * rng.normal(size=(n, i)))
    return rng.normal(size=(o, i)), x, original


def lost(w, approximation, x, original):
    """‖W X̃ - Ŵ X‖², relative."""
    return np.sum((original @ w.T - x @ approximation.T) ** 2) / np.sum((original @ w.T) ** 2)


def compressed(method, w, x, original):
    w, x, original = map(jnp.asarray, (w, x, original))
    stats = None
    if method.observe is not None:
        stats = method.observe(method.init(w.shape[1]), *((x, original)[: 1 + method.paired]))
    return np.asarray(method.compress(w, stats).dequantize(w.dtype)), stats


def test_what_a_weight_loses_is_its_distance_from_the_aim(x64):
    """For α = 1 and λ = 0, whatever Ŵ is: ‖W X̃ - Ŵ X‖² - ‖(W' - Ŵ) X‖² is one number."""
    w, x, original = layer()
    aimed = np.asarray(aim(*map(jnp.asarray, (w, x.T @ x, (original - x).T @ x)), 1.0, 0.0))
    rng = np.random.default_rng(1)
    apart = [
        np.sum((original @ w.T - x @ v.T) ** 2) - np.sum((x @ (aimed - v).T) ** 2)
        for v in (w, aimed, np.zeros_like(w), rng.normal(size=w.shape))
    ]
    np.testing.assert_allclose(apart, apart[0], rtol=1e-9)
    solved = np.linalg.lstsq(x, original @ w.T, rcond=None)[0].T  # by a solver of its own
    np.testing.assert_allclose(aimed, solved, rtol=1e-8)


def test_the_port_is_gptq_where_nothing_was_lost():
    w, x, _ = layer()
    ours = official.gptaq(w, x, x, bits=3)
    reference = gptq_official.fasterquant(w, x.T @ x, bits=3, sym=False).q
    np.testing.assert_allclose(ours, reference, rtol=1e-10)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.some(2)
def test_loses_less_than_the_official_code(x64, bits, alpha):
    """Its columns make up for one another's inputs in one direction only (deviation 1)."""
    for seed in range(3):
        w, x, original = layer(seed)
        # The official code sums 2 x xᵀ / n; neither solution depends on that factor.
        theirs = official.gptaq(w, x, original, bits=bits, alpha=alpha)
        plain = dict(bits=bits, group_size=None, activation_order=False)
        ours, _ = compressed(gptaq(strength=1.0)(gptq(**plain)), w, x, original)
        alone, _ = compressed(gptq(**plain), w, x, original)
        found = [lost(w, each, x, original) for each in (ours, theirs, alone)]
        assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("method", [rtn, gptq])
def test_any_method_loses_less_with_it(method):
    """Data-free ones too."""
    w, x, original = layer()
    inner = method(bits=3, group_size=8)
    found = [lost(w, compressed(m, w, x, original)[0], x, original) for m in
             (gptaq(strength=1.0)(inner), inner)]  # fmt: skip
    assert found[0] < 0.8 * found[1]


def test_changes_nothing_where_nothing_was_lost():
    w, x, _ = layer()
    inner = gptq(bits=3, group_size=8)
    ours, stats = compressed(gptaq()(inner), w, x, x)
    np.testing.assert_array_equal(ours, compressed(inner, w, x, x)[0])
    assert stats.own.gram is None  # GPTQ's own serves


def test_strength_goes_from_the_weight_to_the_aim():
    w, x, original = (jnp.asarray(a, jnp.float32) for a in layer())
    gram, cross = x.T @ x, (original - x).T @ x
    half, whole = aim(w, gram, cross, 0.5), aim(w, gram, cross, 1.0)
    np.testing.assert_allclose(half - w, (whole - w) / 2, rtol=1e-3, atol=1e-4)


def test_weights_of_dead_inputs_stay():
    w, x, original = (jnp.asarray(a, jnp.float32) for a in layer())
    x = x.at[:, 3].set(0)
    aimed = aim(w, x.T @ x, (original - x).T @ x)
    np.testing.assert_array_equal(aimed[:, 3], w[:, 3])
    assert jnp.isfinite(aimed).all()


def test_too_few_activations_without_damping_are_not_hidden():
    w, x, original = (jnp.asarray(a, jnp.float32) for a in layer(n=5))
    assert jnp.isnan(aim(w, x.T @ x, (original - x).T @ x, damping=0.0)).any()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(strength=0.0), "strength=0.0 must be above 0"),
        (dict(strength=1.5), "strength=1.5 must be above 0 and at most 1"),
        (dict(damping=-1.0), "damping=-1.0 must not be negative"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        gptaq(**settings)


GPTAQ = ["calibration=gptaq", "algorithm.format.group_size=32"]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["algorithm=autoround"], "aims at the original's output by itself"),
        (["algorithm=gptq", "walk.sequential=false"], "with walk.sequential=false no layer sees"),
        (["algorithm=gptq", "walk.sequential=block"], "with walk.sequential=block no layer sees"),
    ],
)
def test_what_does_not_compose_is_refused(tmp_path, more, sentence):
    with pytest.raises(UserError, match=sentence):
        compress.run(tiny.config(tmp_path, *GPTAQ, *more))


@pytest.mark.slow
def test_a_model_comes_nearer_to_the_original(tmp_path):
    """The last block's output, on the windows it was calibrated on: by losses of held-out ones."""
    settings = ["algorithm=gptq", "bits=2", *GPTAQ[1:], "data.calibration=48", "data.heldout=16"]
    records = [
        compress.run(tiny.config(tmp_path, *more, *settings)).record
        for more in ([], ["calibration=gptaq"])
    ]
    dense = evaluate.run(tiny.config(tmp_path, *settings[3:], name="evaluate")).record
    losses = [
        np.array(record["metrics"]["perplexity"]["window_losses"]) for record in (*records, dense)
    ]
    without, aimed = (np.abs(each - losses[2]).mean() for each in losses[:2])
    assert aimed < without
