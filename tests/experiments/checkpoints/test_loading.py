"""Modules out of sources."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms.elements import Integer
from algorithms.modules import CompressedLinear
from algorithms.tensors import QuantizedTensor
from experiments.checkpoints import loading
from experiments.checkpoints.sources import open_source
from models.decoder import Decoder
from tests.experiments.checkpoints.synthetic import LLAMA, write_folder

FAMILIES = {
    "llama": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
}


@pytest.fixture(params=FAMILIES)
def source(request, tmp_path):
    write_folder(tmp_path, FAMILIES[request.param])
    return open_source(tmp_path)


def filled_by_hand(source):
    """A decoder initialized the ordinary way, then given the source's tensors one by one."""
    model = Decoder(source.config, rngs=nnx.Rngs(0))
    for name in source.names():
        path, _, kind = name.rpartition(".")
        module = model
        path = {"embed": "stem.", "norm": "tail.", "head": "tail."}.get(path, "") + path
        for part in path.split("."):
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        x = jnp.asarray(source.read(name))
        field = {nnx.Embed: "embedding", nnx.RMSNorm: "scale", nnx.Linear: "kernel"}[type(module)]
        field = "bias" if kind == "bias" else field
        getattr(module, field).set_value(x.T if field == "kernel" else x)
    return model


@pytest.mark.some(1)
def test_the_model_is_what_the_source_says(source):
    tokens = jnp.arange(10)[None] * 5 % source.config.vocabulary
    expected = filled_by_hand(source)(tokens)
    np.testing.assert_array_equal(loading.load_model(source)(tokens), expected)


def test_the_pieces_make_the_model(source):
    tokens = jnp.arange(10)[None]
    model, stem = loading.load_model(source), loading.load_stem(source)
    x = stem(tokens, tokens)
    for layer in range(source.config.layers):
        x, _ = loading.load_block(source, layer)(x, tokens)
    tail = loading.load_tail(source)
    assert hasattr(tail, "head") != source.config.tied_embeddings
    np.testing.assert_array_equal(tail(x, stem.embed), model(tokens))


def test_blocks_of_one_shape_share_one_compilation(source):
    first, second = (nnx.split(loading.load_block(source, layer))[0] for layer in (0, 1))
    assert first == second and hash(first) == hash(second)


def test_arrays_come_in_the_type_asked_for(source):
    block = loading.load_block(source, 0, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(block))} == {jnp.dtype(jnp.bfloat16)}


def test_nothing_is_initialized_at_random(source, monkeypatch):
    keys = []
    monkeypatch.setattr(jax.random, "normal", lambda *a, **k: keys.append(a))
    loading.load_block(source, 0)
    assert not keys


def test_quantized_tensors_bring_their_layers(tmp_path, monkeypatch):
    write_folder(tmp_path, FAMILIES["llama"])
    source = open_source(tmp_path)

    def tensor(name):
        x = source.read(name)
        if x.ndim != 2 or name == "embed.weight":
            return x
        codes = jnp.asarray(np.clip(np.rint(x * 2) + 8, 0, 15), jnp.uint8)
        element = Integer(bits=4, symmetric=True)
        return QuantizedTensor.from_codes(codes, jnp.full((len(x), 1), 0.5), element)

    monkeypatch.setattr(source, "tensor", tensor)
    block, head = loading.load_block(source, 0), loading.load_tail(source).head
    assert isinstance(block.attention.q, CompressedLinear) and isinstance(head, CompressedLinear)
    np.testing.assert_array_equal(
        block.attention.q.bias[...], source.read("blocks.0.attention.q.bias")
    )
    expected = tensor("head.weight").dequantize()
    np.testing.assert_array_equal(head.tensor.dequantize(), expected)


def test_the_config_travels(source):
    assert loading.load_model(source).config == dataclasses.replace(source.config)
