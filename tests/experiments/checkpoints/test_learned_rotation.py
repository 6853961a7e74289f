"""SpinQuant on a whole tiny model: the loss it learns on, and what it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import DenseTensor
from algorithms.walk import compress_block
from experiments.checkpoints.learned_rotation import Learning, draw, learn, quantized_loss
from experiments.checkpoints.loading import load_block, load_model, load_stem, load_tail
from experiments.checkpoints.rotated import RotatedSource, quarot, spinquant
from experiments.errors import UserError
from models.decoder import sites
from tests.experiments.checkpoints.test_rotated import (
    PLAIN,
    TOKENS,
    InMemory,
    change,
    embedded,
    logits,
)

FINE = formats.integer(bits=8, group_size=None, scale_dtype="float32")
WINDOWS = np.random.default_rng(0).integers(0, 53, (5, 12))
PATHS = {path for site in sites(PLAIN, 0) for path in site.readers}


def unturned(source):
    return RotatedSource(source, lambda: jnp.eye(source.config.hidden), heads=True)


@pytest.mark.parametrize("windows", [None, (4, None)])
@pytest.mark.some(1)
def test_the_loss_is_that_of_the_turned_model_with_rounded_inputs(windows):
    """With 8 bits, so that a tie which falls the other way hardly counts."""
    source, rotation = InMemory(change(windows=windows, mlp_bias=True)), quarot()
    turned = rotation(source)
    loss, model = quantized_loss(unturned(source), Learning(format=FINE), ("mlp.down",))
    found = jnp.stack([loss(turned.residual, model, tokens) for tokens in TOKENS])

    method = quantized_inputs(format=FINE)(
        LayerwiseMethod(None, None, lambda w, stats: DenseTensor(w))
    )
    wrapped = {path: rotation.wrap(path, method) for path in PATHS}
    chunks = [embedded(turned)]
    for layer in range(2):
        compress_block(load_block(turned, layer), chunks, wrapped.__getitem__)
    scores = jax.nn.log_softmax(load_tail(turned)(chunks[0].residual, load_stem(turned).embed))
    picked = jnp.take_along_axis(scores[:, :-1], TOKENS[:, 1:, None], -1)
    np.testing.assert_allclose(found, -picked.mean((1, 2)), rtol=1e-3)


def likely(source, n=5, t=16):
    """Windows in which each token is the one that the model thinks likeliest after those before."""
    model = load_model(source)
    following = jax.jit(lambda x: model(x).argmax(-1))
    x = jnp.asarray(np.random.default_rng(0).integers(0, 53, (n, t)))
    for i in range(t - 1):
        x = x.at[:, i + 1].set(following(x)[:, i])
    return np.asarray(x)


def test_learning_lowers_the_loss_and_stays_orthogonal():
    """From no rotation at all, on a model of which two channels stand out."""
    source = InMemory(outliers=(3, 17))
    source.tensors["head.weight"] *= 3
    windows = likely(source)
    learning = Learning(steps=30, tokens=16, range_gradient=True)
    run = functools.partial(
        learn, unturned(source), jnp.eye(48), windows, learning, online=("mlp.down",), seed=0
    )
    r = run()
    loss, model = quantized_loss(unturned(source), learning, ("mlp.down",))
    mean = jax.jit(lambda r: jax.vmap(lambda t: loss(r, model, t))(jnp.asarray(windows)).mean())
    assert mean(r) < 0.97 * mean(jnp.eye(48))
    np.testing.assert_allclose(r.T @ r, np.eye(48), atol=1e-5)


def test_the_range_has_a_gradient_where_it_is_asked_for():
    source = unturned(InMemory(outliers=(3,)))
    r, found = quarot()(source).residual, {}
    for asked in (False, True):
        learning = Learning(range_gradient=asked)
        loss, model = quantized_loss(source, learning, ("mlp.down",))
        found[asked] = jax.value_and_grad(loss)(r, model, TOKENS[0])
    np.testing.assert_allclose(found[True][0], found[False][0], rtol=1e-6)
    assert jnp.isfinite(found[True][1]).all()
    difference = jnp.linalg.norm(found[True][1] - found[False][1])
    assert difference > 0.01 * jnp.linalg.norm(found[False][1])


def test_a_learned_rotation_changes_nothing_and_comes_from_its_seed():
    source = InMemory(change(tied_embeddings=True))
    made = [spinquant(steps=3, tokens=8, seed=s)(source, WINDOWS) for s in (0, 0, 1)]
    np.testing.assert_allclose(logits(made[0]), logits(source), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(made[0].residual, made[1].residual)
    assert jnp.abs(made[0].residual - made[2].residual).max() > 0.1
    start = quarot(seed=0)(source).residual
    assert 1e-4 < jnp.abs(made[0].residual - start).max()


def test_it_is_learned_at_the_first_read_and_wants_windows_then():
    source = InMemory()
    turned = spinquant()(source)
    assert source.reads == [] and turned.config.hidden == 48
    with pytest.raises(UserError, match="is learned, and got no calibration windows"):
        turned.read("embed.weight")
    assert hash(spinquant()) == hash(spinquant()) and spinquant() != quarot()


def test_each_round_of_steps_takes_every_window_once():
    windows = np.arange(5)[:, None] * 100 + np.arange(12)[None]
    drawn = draw(windows, Learning(steps=12, tokens=8), seed=0)
    assert drawn.shape == (12, 8)
    for start in (0, 5):
        assert sorted(drawn[start : start + 5, 0]) == [0, 100, 200, 300, 400]
    np.testing.assert_array_equal(drawn, draw(windows, Learning(steps=12, tokens=8), seed=0))
    assert (drawn != draw(windows, Learning(steps=12, tokens=8), seed=1)).any()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"tokens": 1}, "tokens=1 at least 2"),
        ({"momentum": 1.5}, "momentum=1.5 must be at least 0 and below 1"),
        ({"format": formats.integer(search="diagonal")}, "search=diagonal is for weights"),
    ],
)
def test_bad_settings_are_sentences(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        spinquant(**settings)


def test_a_loss_that_is_not_finite_is_a_sentence():
    source = InMemory()
    source.tensors["blocks.0.attention.q.weight"] *= np.inf
    turned = spinquant(steps=1, tokens=4)(source, WINDOWS)
    with pytest.raises(UserError, match="a loss that is not finite"):
        turned.read("embed.weight")
