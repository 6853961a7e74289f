import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints.loading import load_model
from experiments.evaluation.forward import _run_block
from experiments.evaluation.perplexity import Perplexity, perplexity
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.some(2)
def test_it_is_the_mean_loss_of_the_whole_model(tmp_path, tied, chunk):
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    source = tiny.model(tmp_path, config)
    windows = np.random.default_rng(0).integers(0, config.vocabulary, (5, 12), np.int32)
    found = perplexity(source, windows, chunk=chunk)
    logits = np.asarray(load_model(source)(jnp.asarray(windows)), np.float64)[:, :-1]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = np.take_along_axis(p / p.sum(-1, keepdims=True), windows[:, 1:, None], -1)
    expected = -np.log(p[..., 0]).mean(-1)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    assert found.value == pytest.approx(math.exp(expected.mean()), rel=1e-5)


def test_the_standard_error_is_over_windows():
    found = Perplexity(np.array([1.0, 2.0, 3.0, 6.0]))
    assert found.loss == 3.0
    assert found.loss_error == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert found.error == pytest.approx(math.exp(3.0) * found.loss_error)
    assert math.isnan(Perplexity(np.array([1.0])).loss_error)


def test_a_ruined_model_has_an_infinite_one():
    found = Perplexity(np.array([600.0, 900.0]))
    assert found.loss == 750.0 and found.value == math.inf and found.error == math.inf


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tmp_path):
    source = tiny.model(tmp_path)
    flat = type(source)(tmp_path / "model.gguf")
    flat.read = lambda name: np.zeros_like(source.read(name))
    windows = np.zeros((2, 9), np.int32)
    assert perplexity(flat, windows).value == pytest.approx(CONFIG.vocabulary, rel=1e-5)


def test_depth_costs_no_compilation(tmp_path):
    windows = np.zeros((2, 7), np.int32)
    jax.clear_caches()
    perplexity(tiny.model(tmp_path, dataclasses.replace(CONFIG, layers=5)), windows)
    assert _run_block._cache_size() == 1
