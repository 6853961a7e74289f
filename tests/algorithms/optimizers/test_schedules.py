"""Schedules against ports of the papers' code, and every YAML's promise of a peak of 1."""

import math
from pathlib import Path

import hydra
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from omegaconf import OmegaConf

from algorithms.optimizers.schedules import cosine, linear, power, scaled, wsd
from experiments.configuration import CONF

NAMES = sorted(path.stem for path in Path(CONF, "schedule").glob("*.yaml"))


def official_wsd(step, n, *, final, n_warmup, fract_decay, decay_type):
    """A port of `wsd_schedule`, for a warm-up from zero.

    github.com/epfml/schedules-and-scaling at commit 17e78d6, src/optim/utils.py.
    """
    n_anneal = int(fract_decay * n)
    n_hold = n - n_anneal
    if step < n_warmup:
        return step / n_warmup
    if step < n_hold:
        return 1.0
    if step >= n:
        return final
    x = (step - n_hold) / n_anneal
    shapes = {
        "linear": lambda: final + (1 - final) * (1 - x),
        "sqrt": lambda: final + (1 - final) * (1 - math.sqrt(x)),
        "exponential": lambda: final**x,
    }
    return shapes[decay_type]()


def official_power(step, *, lr, n_warmup, a, b, c):
    """A port of `PowerScheduler`, of the paper's authors.

    github.com/IBM/dolomite-engine at commit d0ee186, lm_engine/optimization/scheduler.py.
    """
    largest = min(1, a / lr * (n_warmup * c) ** b)
    if n_warmup > 0 and step <= n_warmup:
        return largest / n_warmup * step
    return min(1, a / lr * (step * c) ** b)


def values(schedule, steps):
    return np.array([float(schedule(s)) for s in range(steps + 3)])


@pytest.mark.parametrize("shape", ["linear", "sqrt", "exponential"])
@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 7])
def test_wsd_is_the_official_code(shape, end, warmup):
    if shape == "exponential" and end == 0:
        pytest.skip("an exponential does not reach 0, which is refused")
    ours = values(wsd(steps=50, warmup=warmup, decay=0.3, shape=shape, end=end), 50)
    settings = dict(final=end, n_warmup=warmup, fract_decay=0.3, decay_type=shape)
    theirs = [official_wsd(s, 50, **settings) for s in range(53)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_power_is_the_official_code():
    """There by the learning rate and tokens of a step; both meet at step h."""
    lr, a, b, c = 0.02, 4.6, -0.51, 2048
    hold = round((lr / a) ** (1 / b) / c)
    lr = a * (hold * c) ** b  # so that h is a whole step
    assert hold > 10
    ours = values(power(steps=60, warmup=10, hold=hold, exponent=b, decay=0.0), 60)
    theirs = [official_power(s, lr=lr, n_warmup=10, a=a, b=b, c=c) for s in range(63)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_power_ends_with_a_line_from_where_it_is():
    ours, plain = (values(power(steps=100, warmup=10, decay=d), 100) for d in (0.2, 0.0))
    np.testing.assert_allclose(ours[:81], plain[:81])
    np.testing.assert_allclose(ours[80:101], plain[80] * np.linspace(1, 0, 21), atol=1e-6)


def test_a_sqrt_decay_is_below_the_line():
    """It falls faster at first: 1 - √x < 1 - x."""
    found = [values(wsd(steps=40, decay=0.5, shape=s), 40)[21:40] for s in ("sqrt", "linear")]
    assert (found[0] < found[1]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 10])
def test_each_choice_has_a_peak_of_one_after_its_warmup(name, warmup):
    config = OmegaConf.create(
        {"steps": 80, "it": OmegaConf.load(Path(CONF, "schedule", f"{name}.yaml"))}
    )
    config.it.warmup = warmup
    found = values(hydra.utils.instantiate(config.it), 80)
    assert found[warmup] == found.max() == 1
    np.testing.assert_allclose(found[:warmup], np.arange(warmup) / 10, rtol=1e-6)
    assert (np.diff(found[warmup:]) <= 0).all()
    assert found[80] == pytest.approx(1 if name == "constant" else 0, abs=1e-6)


def test_linear_and_cosine_end_where_they_are_told():
    for make in (linear, cosine):
        found = values(make(steps=40, warmup=10, end=0.25), 40)
        assert found[40] == pytest.approx(0.25) and found[25] == pytest.approx(0.625)


def test_scaled_is_an_optimizers_learning_rate():
    schedule = scaled(wsd(steps=10, decay=0.5, shape="linear"), 0.3)
    np.testing.assert_allclose([float(schedule(s)) for s in (0, 5, 10)], [0.3, 0.3, 0], atol=1e-7)
    optimizer = optax.sgd(schedule)
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -0.3, rtol=1e-6)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: wsd(steps=9, shape="cosine"), "shape=cosine must be one of linear, sqrt, exp"),
        (lambda: wsd(steps=9, shape="exponential"), "end=0.0 must be above 0 for an exp"),
        (lambda: wsd(steps=9, decay=1.5), "decay=1.5 must be a fraction"),
        (lambda: wsd(steps=9, warmup=8), "warmup=8 and the decay's 2 must fit into steps=9"),
        (lambda: power(steps=9, warmup=5, hold=3), "hold=3 must be at least warmup=5"),
        (lambda: power(steps=9, exponent=0.5), "exponent=0.5 must be below 0"),
    ],
)
def test_bad_settings_are_named(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
