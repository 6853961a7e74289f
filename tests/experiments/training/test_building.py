"""From a configuration to an optimizer: schedules, clipping, what goes around it, who gets what."""

import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from experiments.errors import UserError
from experiments.training.building import assigned, build_optimizer
from tests.experiments.training import small

PARAMS = {"blocks": [{"kernel": jnp.ones((2, 3))}], "embed": jnp.ones((4, 2))}
GRADIENTS = {"blocks": [{"kernel": jnp.full((2, 3), 3.0)}], "embed": jnp.full((4, 2), 4.0)}


def updates(config, steps=1):
    optimizer = build_optimizer(config)
    state = optimizer.init(PARAMS)
    for _ in range(steps):
        found, state = optimizer.update(GRADIENTS, state, PARAMS)
    return found


def sgd(folder, *more):
    return small.config(folder, "optimizer=sgd", "optimizer.momentum=null",
                        "optimizer.nesterov=false", *more)  # fmt: skip


def test_a_learning_rate_is_the_peak_of_the_schedule(tmp_path):
    found = updates(sgd(tmp_path, "optimizer.learning_rate=0.5", "schedule.warmup=4"), steps=2)
    np.testing.assert_allclose(found["embed"], -0.5 * 0.25 * 4.0)


def test_all_learning_rates_are_multiplied(tmp_path):
    config = sgd(tmp_path, "optimizer.learning_rate=0.5", "learning_rates=0.1")
    np.testing.assert_allclose(updates(config)["embed"], -0.05 * 4.0, rtol=1e-6)


def test_those_within_groups_too(tmp_path):
    """While gradients stay, AdamW moves by its learning rate; Muon's other group is AdamW."""
    config = small.config(tmp_path, "optimizer=muon", "optimizer.others.learning_rate=0.5",
                          "schedule.warmup=10")  # fmt: skip
    np.testing.assert_allclose(updates(config, steps=2)["embed"], -0.05, rtol=1e-5)


def test_gradients_are_clipped_before_anything_else(tmp_path):
    norm = np.sqrt(6 * 9.0 + 8 * 16.0)
    found = updates(sgd(tmp_path, "optimizer.learning_rate=1", "clip=2.0"))
    np.testing.assert_allclose(found["embed"], -2.0 * 4.0 / norm, rtol=1e-6)
    with pytest.raises(UserError, match="clip=-1 must be positive"):
        build_optimizer(sgd(tmp_path, "clip=-1"))


def test_of_sam_the_gradient_uphill_is_clipped(tmp_path):
    """The first gradient, which only points the way, is not what its step is taken by."""
    sam = ["optimizer=sam", "optimizer.inner._target_=optax.sgd", "optimizer.inner.learning_rate=1"]
    sgd = ["~optimizer.inner.b1", "~optimizer.inner.b2", "~optimizer.inner.weight_decay"]
    made = build_optimizer(small.config(tmp_path, *sam, *sgd, "clip=2.0"))
    params, uphill = {"w": jnp.zeros(4)}, {"w": jnp.full(4, 10.0)}
    found, _ = made.update(
        {"w": jnp.ones(4)}, made.init(params), params, grad_fn=lambda p, _: uphill
    )
    np.testing.assert_allclose(found["w"], -1.0, rtol=1e-6)


def test_each_parameter_has_its_optimizer_for_the_dry_run(tmp_path):
    found = assigned(small.config(tmp_path, "optimizer=muon"), PARAMS)
    assert found == {"blocks.0.kernel": "matrices: muon", "embed": "others: adamw"}
    found = assigned(sgd(tmp_path), PARAMS)
    assert set(found.values()) == {"sgd"}


def test_settings_that_an_optimizer_refuses_are_sentences(tmp_path):
    config = small.config(tmp_path, "optimizer=muon")
    OmegaConf.update(config, "optimizer.match.matrices", "(", force_add=True)
    with pytest.raises(UserError, match="match.matrices='\\(' is no regular expression"):
        build_optimizer(config)
