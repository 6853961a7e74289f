"""The decoder against transformers' own logits, and against itself."""

import dataclasses

import hydra.utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from omegaconf import OmegaConf

from experiments.checkpoints.loading import load_model
from models import rope
from models.config import DecoderConfig
from models.decoder import Decoder
from models.layers import KVCache
from tests.peers import goldens
from tests.peers.goldens import Golden

TOLERANCE = 1e-4  # on logits, absolute, in float32


@pytest.fixture(scope="module", params=goldens.names(goldens.COMMITTED))
def golden(request: pytest.FixtureRequest) -> Golden:
    return goldens.load(goldens.COMMITTED / request.param)


@pytest.fixture(scope="module")
def decoder(golden: Golden) -> Golden:
    if not golden.model.config.causal:
        pytest.skip("an encoder: every token sees all of them")
    return golden


def test_logits_are_those_of_transformers(golden: Golden) -> None:
    ours = goldens.forward(golden.model, golden.tokens)
    np.testing.assert_allclose(ours, golden.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.some(7)
def test_decoding_step_by_step_is_the_full_forward(decoder: Golden) -> None:
    golden = within_original_context(decoder)
    full = goldens.forward(golden.model, golden.tokens)
    length, first = golden.tokens.shape[1], 9  # a prompt of nine, then one token at a time
    caches = empty_caches(golden.model.config, golden.tokens.shape[0], length + 3)
    logits, caches = decode(golden.model, golden.tokens[:, :first], caches)
    steps = [logits]
    for t in range(first, length):
        logits, caches = decode(golden.model, golden.tokens[:, t : t + 1], caches)
        steps.append(logits)
    np.testing.assert_allclose(
        jnp.stack(steps, axis=1), full[:, first - 1 :], rtol=0, atol=TOLERANCE
    )
    assert all((cache.length == length).all() for cache in caches)


def test_a_later_token_leaves_earlier_logits_alone(decoder: Golden) -> None:
    golden = decoder
    cut = golden.tokens.shape[1] // 2
    before = goldens.forward(golden.model, golden.tokens)
    after = goldens.forward(golden.model, change(golden, cut))
    np.testing.assert_allclose(after[:, :cut], before[:, :cut], rtol=0, atol=1e-6)
    assert np.abs(after[:, cut] - before[:, cut]).max(axis=-1).min() > 0.1


def test_a_token_beyond_every_window_has_no_effect() -> None:
    golden = goldens.load(goldens.COMMITTED / "mistral")
    config = golden.model.config
    reach = 1 + sum((config.layer(layer).window or 0) - 1 for layer in range(config.layers))
    before = goldens.forward(golden.model, golden.tokens)
    after = goldens.forward(golden.model, change(golden, 0))
    changed = np.abs(after - before).max(axis=(0, 2)) > 1e-6
    assert changed[:reach].all() and not changed[reach:].any()


@pytest.mark.parametrize(
    "scaling",
    [
        rope.RopeScaling(kind="linear", factor=2.5),
        rope.RopeScaling(kind="llama3", factor=8.0),
        rope.RopeScaling(
            kind="llama3",
            factor=32.0,
            low_frequency_factor=1.5,
            high_frequency_factor=6.0,
            original_context=512,
        ),
    ],
)
def test_scaled_frequencies(scaling: rope.RopeScaling) -> None:
    ours = rope.frequencies(128, 500000.0, scaling)
    np.testing.assert_allclose(ours, port_of_frequencies(128, 500000.0, scaling), rtol=3e-6)


@pytest.mark.real
def test_smollm2_is_that_of_transformers() -> None:
    model = load_model(hydra.utils.instantiate(OmegaConf.load(goldens.EMBEDDED)))
    with np.load(goldens.SMOLLM2) as expected:
        ours = np.asarray(goldens.forward(model, jnp.asarray(expected["tokens"])))
        difference = ours[:, expected["positions"]] - expected["logits"]
        losses = [mean_loss(*pair) for pair in zip(ours, expected["tokens"], strict=True)]
        np.testing.assert_allclose(difference, 0, atol=TOLERANCE)
        np.testing.assert_allclose(losses, expected["losses"][expected["windows"]], atol=1e-5)


def within_original_context(golden: Golden) -> Golden:
    """LongRoPE turns what it caches by the length so far: beyond that, steps are no full pass."""
    scaling, length = golden.model.config.rope_scaling, golden.tokens.shape[1]
    if scaling is not None and scaling.kind == "longrope":
        length = min(length, scaling.original_context)
    return dataclasses.replace(golden, tokens=golden.tokens[:, :length])


@nnx.jit
def decode(
    model: Decoder, tokens: jax.Array, caches: tuple[KVCache, ...]
) -> tuple[jax.Array, tuple[KVCache, ...]]:
    return model.decode(tokens, caches, jnp.full(tokens.shape[0], tokens.shape[1]))


def empty_caches(config: DecoderConfig, batch: int, room: int) -> tuple[KVCache, ...]:
    nothing = jnp.full((batch, room, config.kv_heads, config.head_size), 1e3)  # must not be seen
    return (KVCache(nothing, nothing, jnp.zeros(batch, jnp.int32)),) * config.layers


def change(golden: Golden, position: int) -> jax.Array:
    """The tokens with another one at a position of every window."""
    vocabulary = golden.model.config.vocabulary
    return golden.tokens.at[:, position].set((golden.tokens[:, position] + 1) % vocabulary)


def mean_loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    """The loss of one window over positions 1..T-1, in float64."""
    x = logits[:-1].astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(x, tokens[1:, None], axis=-1)[:, 0]
    return float(np.mean(np.log(np.exp(x).sum(axis=-1)) - chosen))


def port_of_frequencies(size: int, theta: float, scaling: rope.RopeScaling) -> np.ndarray:
    """transformers' rule in float64: by wavelength, three cases."""
    f = 1.0 / theta ** (np.arange(0, size, 2) / size)
    if scaling.kind == "linear":
        return f / scaling.factor
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    found = []
    for x in f:
        wavelength = 2 * np.pi / x
        if wavelength < scaling.original_context / high:
            found.append(x)
        elif wavelength > scaling.original_context / low:
            found.append(x / scaling.factor)
        else:
            s = (scaling.original_context / wavelength - low) / (high - low)
            found.append((1 - s) * x / scaling.factor + s * x)
    return np.array(found)
