"""Scion against a port of the official code, its theory, and gradient descent."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from omegaconf import OmegaConf

from algorithms.optimizers.groups import assignment
from algorithms.optimizers.scion import (
    col_norm,
    rms,
    row_norm,
    scale_by_scion,
    scion,
    sign,
    spectral,
)
from experiments.configuration import CONF
from models.config import DecoderConfig
from models.decoder import Decoder
from tests.algorithms.optimizers import scion_official as official
from tests.algorithms.optimizers import trajectories
from tests.algorithms.optimizers.trajectories import SHAPES, STEPS, gradient, run, start

SMALL = DecoderConfig(
    vocabulary=24, hidden=16, layers=1, heads=2, kv_heads=1, head_size=8, feed_forward=20,
    context=16, qkv_bias=True,
)  # fmt: skip
NORMS = {
    "spectral": (spectral(), official.spectral),
    "sign": (sign, official.sign),
    "col_norm": (col_norm, official.col_norm),
    "row_norm": (row_norm, official.row_norm),
}
# Of W = kernelᵀ, as the header of scion.py has them
SIZE = {
    "spectral": lambda w: np.sqrt(w.shape[1] / w.shape[0]) * np.linalg.norm(w, 2),
    "sign": lambda w: w.shape[1] * np.abs(w).max(),
    "col_norm": lambda w: np.sqrt((w**2).mean(0)).max(),
    "row_norm": lambda w: np.sqrt(w.shape[1]) * np.linalg.norm(w, axis=1).max(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("constrained", [True, False])
def test_steps_are_the_official_codes(x64, shape, name, constrained):
    ours, theirs = NORMS[name]
    w = start(shape)
    found = run(scion(0.05, norm=ours, radius=3.0, momentum=0.2, constrained=constrained), w)
    expected = official.scion(
        w, gradient, STEPS, lmo=theirs, lr=0.05, momentum=0.2, scale=3.0,
        unconstrained=not constrained,
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


def test_a_table_of_embeddings_is_a_layer_whose_inputs_are_tokens(x64):
    """Ours is [tokens, out] as torch's is, where `run` would transpose a kernel."""
    table = start((9, 4))
    found = run(scion(0.05, norm=col_norm), table.T)
    expected = official.scion(
        table, lambda w, step: gradient(w.T, step).T, STEPS, lmo=official.col_norm_of_embeddings,
        lr=0.05, momentum=0.1, scale=1.0, unconstrained=False,
    )  # fmt: skip
    np.testing.assert_allclose([each.T for each in found], expected, rtol=1e-9, atol=1e-11)


def test_vectors_go_by_their_root_mean_square(x64):
    g = start((7,))
    np.testing.assert_allclose(rms(jnp.asarray(g)), official.bias_rms(g), rtol=1e-12)


@pytest.mark.parametrize("name", NORMS)
def test_iterates_stay_in_the_ball(x64, name):
    """From zero; the Newton-Schulz iteration's singular values reach 1.21, not 1, at the most."""
    ours, _ = NORMS[name]
    found = run(scion(0.3, norm=ours, radius=2.0), np.zeros((6, 10)), steps=40)
    sizes = [SIZE[name](w) for w in found]
    room = 1.21 if name == "spectral" else 1 + 1e-9
    assert 1.0 < max(sizes) <= 2.0 * room
    free = run(scion(0.3, norm=ours, radius=2.0, constrained=False), 9 * start((6, 10)), steps=40)
    assert max(SIZE[name](w) for w in free) > 2.0 * room


@pytest.mark.parametrize("name", NORMS)
def test_no_point_of_the_ball_is_further_along_the_gradient(x64, name):
    """That is what an lmo is; of random points on the ball's surface."""
    ours, _ = NORMS[name]
    rng = np.random.default_rng(0)
    g = rng.normal(size=(6, 10))
    found = np.asarray(ours(jnp.asarray(g.T))).T
    low, high = (0.68, 1.21) if name == "spectral" else (1 - 1e-6, 1 + 1e-6)
    assert low <= SIZE[name](found) <= high
    points = [rng.normal(size=g.shape) for _ in range(200)]
    others = max(np.sum(g * p / SIZE[name](p)) for p in points)
    assert np.sum(g * found) > others


def test_the_gradients_scale_does_not_matter(x64):
    optimizer = scion(0.05, norm=spectral())
    once, scaled = (run(optimizer, start((6, 10)), scale=scale) for scale in (1.0, 1e3))
    np.testing.assert_allclose(once, scaled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_experts_are_matrices_of_their_own(name):
    ours, _ = NORMS[name]
    g = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 8)), jnp.float32)
    whole = ours(g)
    for e in range(3):
        np.testing.assert_allclose(whole[e], ours(g[e]), rtol=1e-4, atol=1e-6)


def test_bfloat16_parameters_have_bfloat16_updates():
    kernel = jnp.ones((4, 6), jnp.bfloat16)
    for norm, _ in NORMS.values():
        optimizer = scion(0.1, norm=norm)
        updates, _ = optimizer.update(kernel, optimizer.init(kernel), kernel)
        assert updates.dtype == jnp.bfloat16


def test_it_gets_lower_than_gradient_descent_does():
    loss, w = trajectories.ill_conditioned()
    steps = 200
    rate = optax.linear_schedule(0.5, 0.0, steps)
    ours = scion(rate, norm=spectral(), momentum=0.5, constrained=False)
    found = trajectories.descend(ours, w, loss, steps)
    assert found < 0.1 * trajectories.best_of_gradient_descent(loss, w, steps)


def test_the_configuration_gives_each_kind_of_layer_its_norm():
    config = OmegaConf.load(Path(CONF, "optimizer", "scion.yaml"))
    model = nnx.eval_shape(lambda: Decoder(SMALL, rngs=nnx.Rngs(0)))
    groups = assignment(nnx.state(model, nnx.Param), config.match)
    assert groups["stem.embed.embedding"] == "embeddings"
    assert groups["blocks.0.attention.q.kernel"] == "matrices"
    assert groups["blocks.0.attention.q.bias"] == "vectors"
    assert groups["tail.norm.scale"] == "vectors"
    assert groups["tail.head.kernel"] == "head"


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(momentum=0.0), "momentum=0.0 must be above 0 and at most 1"),
        (dict(momentum=1.5), "momentum=1.5 must be above 0 and at most 1"),
        (dict(radius=0.0), "radius=0.0 must be above 0"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        scion(0.1, norm=sign, **settings)


def test_coefficients_are_named():
    with pytest.raises(ValueError, match="coefficients='svd' must be"):
        spectral(coefficients="svd")


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_matrices_refuse_vectors(name):
    optimizer, bias = scale_by_scion(norm=NORMS[name][0]), jnp.zeros(3)
    with pytest.raises(ValueError, match=rf"norm={name} is of matrices, .* shape \(3,\): try rms"):
        optimizer.update(bias, optimizer.init(bias), bias)
