"""Whole models read in other coordinates: what they compute stays, what stands out goes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import formats
from algorithms.activations import quantized_inputs
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import DenseTensor
from algorithms.walk import compress_block
from experiments.checkpoints.loading import load_block, load_model, load_stem
from experiments.checkpoints.rotated import RotatedSource, quarot
from experiments.checkpoints.sources import Source
from experiments.errors import UserError
from models.block import Flow
from models.config import DecoderConfig, Mixing
from models.decoder import sites
from tests.algorithms.integers import rtn
from tests.algorithms.quantization import quarot_official as official
from tests.experiments import tiny

PLAIN = DecoderConfig(
    vocabulary=53, hidden=48, layers=2, heads=4, kv_heads=2, head_size=16, feed_forward=64,
    context=64,
)  # fmt: skip
change = functools.partial(dataclasses.replace, PLAIN)
FAMILIES = {
    "llama": PLAIN,
    "smollm2, tied": change(tied_embeddings=True),
    "qwen2, biases of q, k and v": change(qkv_bias=True, tied_embeddings=True),
    "every bias": change(qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen3, norms of q and k": change(qk_norm=True),
    "mistral, windows": change(windows=(4, None)),
    "granite, multipliers": change(embed_scale=3.0, residual_scale=0.5, logit_scale=0.4),
    "olmoe, experts": change(experts=Mixing(count=5, chosen=2, feed_forward=24)),
    "qwen2_moe, a shared expert": change(
        experts=Mixing(count=3, chosen=2, feed_forward=24, shared=32, layers=(1,))
    ),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 53, (2, 12)))
DOWN = "mlp.down"


class InMemory(Source):
    """Random weights at a trained model's scale; `outliers` channels of the residual stand out."""

    location = "memory"

    def __init__(self, config=PLAIN, outliers=()):
        self.config, self.reads = config, []
        self.tensors = tiny.tensors(config)
        for channel in outliers:
            self.tensors["embed.weight"][:, channel] *= 30

    def names(self):
        return frozenset(self.tensors)

    def read(self, name):
        self.reads.append(name)
        return self.tensors[name]

    def tokenizer(self):
        raise AssertionError("the tokenizer was asked for")

    def digest(self):
        return "digest"


def logits(source):
    return forward(*nnx.split(load_model(source)))


@functools.partial(jax.jit, static_argnames="graph")
def forward(graph, state):
    return nnx.merge(graph, state)(TOKENS)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_turned_model_computes_what_it_did(family, kind):
    source = InMemory(FAMILIES[family])
    turned = quarot(kind=kind, seed=1)(source)
    np.testing.assert_allclose(logits(turned), logits(source), rtol=1e-4, atol=1e-4)


def test_without_heads_and_where_no_hadamard_matrix_is():
    source = InMemory(change(hidden=30, feed_forward=50))
    turned = quarot(kind="random", heads=False, online=[])(source)
    np.testing.assert_allclose(logits(turned), logits(source), rtol=1e-4, atol=1e-4)
    name = "blocks.0.attention.v.weight"
    r, gamma = turned.residual, source.tensors["blocks.0.attention_norm.weight"]
    np.testing.assert_allclose(turned.read(name), source.tensors[name] * gamma @ r, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "smollm2, tied", "every bias"])
def test_tensors_are_those_of_the_official_code(family):
    """But for o, which is not turned across heads (deviation 1), and down, whose own turn is the
    tensor's (deviation 2). Values' biases, which it leaves out, are turned too (deviation 3).
    """
    source = InMemory(change(**vars(FAMILIES[family]) | {"hidden": 32, "head_size": 8}))
    turned = quarot()(source)
    r = np.asarray(turned.residual, np.float64)
    expected = official.rotate_model(source.tensors, r, 2, 8)
    assert turned.names() == expected.keys()
    for name, x in expected.items():
        found = np.asarray(turned.read(name), np.float64)
        if "attention.v.bias" in name:
            continue
        if "attention.o.weight" in name:  # across 4 heads, H_4 ⊗ I
            across = np.kron(official.matmul_had(np.eye(4)), np.eye(8))
            found = found @ across
        if "mlp.down.weight" in name:
            found = official.matmul_had(found)
        np.testing.assert_allclose(found, x, atol=1e-5, err_msg=name)


def test_the_rest_is_passed_through():
    source = InMemory(FAMILIES["smollm2, tied"])
    turned = quarot()(source)
    assert isinstance(turned, RotatedSource)
    assert (turned.digest(), turned.location) == ("digest", "memory")
    with pytest.raises(AssertionError, match="the tokenizer was asked for"):
        turned.tokenizer()
    assert turned.config == dataclasses.replace(source.config, tied_embeddings=False)
    assert turned.names() == source.names() | {"head.weight"}


def test_a_tensor_is_read_when_asked_for_with_its_norm():
    source = InMemory()
    turned = quarot()(source)
    assert source.reads == []
    turned.read("blocks.1.mlp.up.weight")
    assert source.reads == ["blocks.1.mlp.up.weight", "blocks.1.mlp_norm.weight"]
    source.reads.clear()
    assert (turned.read("blocks.0.attention_norm.weight") == 1).all() and not source.reads
    assert turned.read("blocks.0.mlp.down.weight").dtype == np.float32


def test_the_seed_decides():
    def read(seed):
        return quarot(seed=seed)(InMemory()).read("embed.weight")

    np.testing.assert_array_equal(read(0), read(0))
    assert np.abs(read(0) - read(1)).max() > 0.1


def activations(source):
    """What each site of the first block holds."""
    block, flow, found = load_block(source, 0), embedded(source), {}
    for stage, site in zip(block.stages(), block.sites, strict=False):
        flow = stage(flow)
        found[site.name] = np.asarray(flow.activation, np.float64).reshape(
            -1, flow.activation.shape[-1]
        )
    return found


def embedded(source):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    x = load_stem(source)(TOKENS, positions)
    return Flow(x, x, positions)


def test_no_channel_stands_out_once_turned():
    source = InMemory(outliers=(3, 17))
    before, after = activations(source), activations(quarot()(source))
    for site in ("attention.input", "mlp.input"):
        peak = [np.median(np.abs(x).max(1) / np.sqrt((x**2).mean(1))) for x in
                (before[site], after[site])]  # fmt: skip
        kurtosis = [((x / x.std()) ** 4).mean() for x in (before[site], after[site])]
        assert peak[1] < 0.75 * peak[0] and kurtosis[1] < 0.4 * kurtosis[0], site


def w4a4(source, rotation=None):
    """The model's output after W4A4 rounding, one scale per row and per token."""
    format = formats.integer(bits=4, group_size=None, symmetric=True, scale_dtype="float32")
    method = quantized_inputs(format=format)(rtn(bits=4, group_size=None, symmetric=True))
    paths = {path for site in sites(PLAIN, 0) for path in site.readers}
    wrapped = {p: rotation.wrap(p, method) if rotation else method for p in paths}
    chunks = [embedded(source)]
    for layer in range(source.config.layers):
        compress_block(load_block(source, layer), chunks, wrapped.__getitem__)
    return chunks[0].residual


def test_rounded_to_w4a4_a_turned_model_is_nearer_to_itself():
    source, rotation = InMemory(outliers=(3, 17)), quarot()
    turned = rotation(source)
    exact = embedded(source)
    for layer in range(2):
        exact = exact._replace(
            residual=load_block(source, layer)(exact.residual, exact.positions)[0]
        )

    def error(found):
        return float(jnp.linalg.norm(found - exact.residual))

    back = w4a4(turned, rotation) @ turned.residual.T
    assert error(back) < 0.8 * error(w4a4(source))


def test_layers_named_online_turn_their_input_and_others_do_not():
    rotation = quarot()
    method = LayerwiseMethod(jnp.zeros, lambda s, x: s + x.sum(0), lambda w, s: DenseTensor(w))
    assert rotation.wrap("mlp.up", method) is method
    wrapped = rotation.wrap(DOWN, method)
    assert wrapped is not method and wrapped.observe is not method.observe
    tensor = wrapped.compress(jnp.ones((8, 64)), wrapped.init(64))
    assert type(tensor).__name__ == "RotatedTensor"
    assert hash(rotation) == hash(quarot()) and rotation == quarot()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"kind": "givens"}, "kind='givens' must be hadamard or random"),
        ({"online": ["mlp.gate"]}, "names 'mlp.gate': expected some of attention.o, mlp.down"),
        ({"online": ["attention.o"]}, "which would turn its heads back: set heads=false"),
    ],
)
def test_bad_settings_are_sentences(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        quarot(**settings)


@pytest.mark.parametrize(
    "width, sentence",
    [
        ({"hidden": 30}, "the residual wants a Hadamard matrix of order 30.*set kind=random"),
        ({"head_size": 6}, "heads=true wants a Hadamard matrix of order 6.*set heads=false"),
        ({"feed_forward": 50}, "online=mlp.down wants .* order 50.*leave it out of online"),
    ],
)
def test_a_width_without_a_hadamard_matrix_is_refused_before_anything_is_read(width, sentence):
    source = InMemory(change(**width))
    with pytest.raises(UserError, match=sentence):
        quarot()(source)
    assert source.reads == []


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"norm": "layer"}, "norms that subtract a mean, which do not commute"),
        ({"post_norms": True}, "norms behind attention and MLP, which do not commute"),
        ({"positions": "learned"}, "learned positions, which do not commute"),
    ],
)
def test_a_model_that_a_turn_would_change_is_refused(changes, sentence):
    with pytest.raises(UserError, match=f"family llama has {sentence}.*rotation=none"):
        quarot()(InMemory(change(**changes)))
