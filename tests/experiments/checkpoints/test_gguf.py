"""GGUF files: values against the `gguf` package's own dequantizer, metadata, and damage."""

import dataclasses
import os
import struct
from pathlib import Path

import gguf
import gguf.quants
import hydra.utils
import ml_dtypes
import numpy as np
import omegaconf
import pytest

from experiments.checkpoints.gguf import unpermute
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from models import rope
from models.rope import RopeScaling
from tests.experiments.checkpoints.synthetic import (
    CONFIG,
    gguf_metadata,
    permute,
    random_tensors,
    write_gguf,
)

ROOT = Path(__file__).parents[3]
Type = gguf.GGMLQuantizationType
QUANTIZABLE = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"]
SCALES_AT = {  # byte offsets of the float16 fields in a block of 256 weights
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(CONFIG)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def heads_of(name):
    return {"attention.q": CONFIG.heads, "attention.k": CONFIG.kv_heads}.get(
        name.split(".", 2)[-1].rpartition(".")[0]
    )


def permuted(tensors):
    return {n: permute(x, h) if (h := heads_of(n)) else x for n, x in tensors.items()}


def test_a_file_of_floats_gives_back_the_model(path, tensors):
    write_gguf(path, permuted(tensors), gguf_metadata())
    source = open_source(path)
    assert source.config == CONFIG
    assert source.names() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(source.read(name), x)


@pytest.mark.parametrize("kind", QUANTIZABLE)
def test_quantized_types(path, tensors, kind):
    kind = Type[kind]
    write_gguf(path, tensors, gguf_metadata(), kind=kind)
    source = open_source(path)
    for name, x in tensors.items():
        if x.ndim == 2:
            expected = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
            if heads := heads_of(name):
                expected = unpermute(expected, heads)
            np.testing.assert_array_equal(source.read(name).astype(np.float32), expected)


def test_floats_keep_their_type(path, tensors):
    for kind, dtype in ((Type.F16, np.float16), (Type.BF16, ml_dtypes.bfloat16)):
        write_gguf(path, tensors, gguf_metadata(), kind=kind)
        x = open_source(path).read("embed.weight")
        assert x.dtype == dtype and not x.flags.writeable


def random_blocks(kind, rows, rng):
    """Any bytes are a valid block once its float16 fields are finite."""
    size = gguf.GGML_QUANT_SIZES[Type[kind]][1]
    blocks = rng.integers(0, 256, (rows, size), np.uint8)
    for at in SCALES_AT[kind]:
        scale = rng.uniform(0.01, 0.1, (rows, 1)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", SCALES_AT)
def test_k_quants(path, kind):
    config = dataclasses.replace(CONFIG, hidden=256, heads=4, head_size=64, layers=1)
    tensors = random_tensors(config)
    blocks = random_blocks(kind, 64, np.random.default_rng(0))
    del tensors["blocks.0.mlp.up.weight"]
    metadata = gguf_metadata(config=config)
    writer_tensor = {"blk.0.ffn_up.weight": blocks}
    write_gguf(path, tensors, metadata, extra=writer_tensor, extra_kind=Type[kind])
    expected = gguf.quants.dequantize(blocks, Type[kind])
    assert expected.shape == (64, 256) and expected.std() > 0
    np.testing.assert_array_equal(open_source(path).read("blocks.0.mlp.up.weight"), expected)


def test_unpermute_undoes_the_converter():
    x = np.arange(2 * 6 * 5).reshape(12, 5)
    np.testing.assert_array_equal(unpermute(permute(x, 2), 2), x)
    np.testing.assert_array_equal(unpermute(permute(x[:, 0], 2), 2), x[:, 0])
    # Row 1 of a file is the first of the second half: channels 0, 3, 1, 4, 2, 5 of each head.
    np.testing.assert_array_equal(permute(x, 2)[:6, 0] // 5, [0, 3, 1, 4, 2, 5])


def test_qwen_rows_stay_where_they_are(path):
    config = dataclasses.replace(CONFIG, family="qwen2", qkv_bias=True)
    tensors = random_tensors(config)
    write_gguf(path, tensors, gguf_metadata("qwen2"), architecture="qwen2")
    source = open_source(path)
    assert source.config == config
    for name, x in tensors.items():
        np.testing.assert_array_equal(source.read(name), x)


def test_qwen3(path):
    config = dataclasses.replace(CONFIG, family="qwen3", qk_norm=True, tied_embeddings=True)
    write_gguf(path, random_tensors(config), gguf_metadata("qwen3"), architecture="qwen3")
    assert open_source(path).config == config


def test_llama_biases_are_permuted_with_their_rows(path):
    config = dataclasses.replace(CONFIG, qkv_bias=True, output_bias=True, mlp_bias=True)
    tensors = random_tensors(config)
    write_gguf(path, permuted(tensors), gguf_metadata())
    source = open_source(path)
    assert source.config == config
    for name in ("q", "k", "v", "o"):
        name = f"blocks.1.attention.{name}.bias"
        np.testing.assert_array_equal(source.read(name), tensors[name])


def llama3_divisors(factor=32.0, low=1.0):
    scaling = RopeScaling(kind="llama3", factor=factor, low_frequency_factor=low)
    f = [np.asarray(rope.frequencies(CONFIG.head_size, 5e5, s)) for s in (None, scaling)]
    return {"rope_freqs.weight": (f[0] / f[1]).astype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "extra", "scaling"),
    [
        ({}, None, None),
        ({}, llama3_divisors(), RopeScaling(kind="llama3", factor=32.0)),
        ({}, llama3_divisors(1.0), None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            None,
            RopeScaling(kind="linear", factor=4.0),
        ),
        ({"llama.rope.scale_linear": 4.0}, None, RopeScaling(kind="linear", factor=4.0)),
        ({"llama.rope.scaling.type": "none"}, None, None),
    ],
)
def test_rotary_positions(path, tensors, changes, extra, scaling):
    metadata = gguf_metadata() | {"llama.rope.freq_base": 5e5} | changes
    write_gguf(path, tensors, metadata, extra=extra)
    config = open_source(path).config
    assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)


def test_a_window_in_every_layer(path, tensors):
    write_gguf(path, tensors, gguf_metadata() | {"llama.attention.sliding_window": 16})
    assert open_source(path).config.windows == (16, 16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"llama.block_count": None}, "llama.block_count=None where a positive whole number"),
        ({"llama.attention.head_count": [3, 3]}, r"head_count=\[3, 3\] where a positive whole"),
        ({"llama.attention.head_count_kv": 2}, "not describe a model .kv_heads=2 must divide"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks .*layer_norm_rms_epsilon"),
        ({"llama.expert_count": 8}, "is a mixture of experts"),
        ({"llama.rope.dimension_count": 16}, "heads of 32 channels with 16 of them rotated"),
        ({"llama.attention.value_length": 16}, "and values of 16"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            "scaled by yarn with factor 4.0, which planish does not run",
        ),
        ({"llama.embedding_length": 192}, r"has shape \(53, 96\) where .* says \(53, 192\)"),
        ({"llama.block_count": 3}, "lacks the tensor blk.2."),
    ],
)
def test_metadata_that_planish_does_not_run(path, tensors, changes, sentence):
    changed = gguf_metadata() | changes
    write_gguf(path, tensors, {k: v for k, v in changed.items() if v is not None})
    with pytest.raises(UserError, match=sentence):
        open_source(path)


def test_an_unknown_architecture(path, tensors):
    write_gguf(path, tensors, gguf_metadata("gemma"), architecture="gemma")
    with pytest.raises(UserError, match="architecture gemma, which .* it runs llama, qwen2, qwen3"):
        open_source(path)


def test_a_window_in_unknown_layers(path, tensors):
    metadata = gguf_metadata("qwen3") | {"qwen3.attention.sliding_window": 16}
    write_gguf(path, tensors, metadata, architecture="qwen3")
    with pytest.raises(UserError, match="a sliding window but not which layers"):
        open_source(path)


def test_other_divisors_of_the_rotation(path, tensors):
    write_gguf(path, tensors, gguf_metadata(), extra=llama3_divisors(low=2.0))
    with pytest.raises(UserError, match="rope_freqs.weight. that are not Llama 3's"):
        open_source(path)


def test_a_type_that_planish_does_not_read(path, tensors):
    changed = tensors | {"norm.weight": np.ones(CONFIG.hidden, np.int32)}
    write_gguf(path, changed, gguf_metadata())
    with pytest.raises(UserError, match="output_norm.weight in .* is stored as I32"):
        open_source(path)


def test_no_embedding(path, tensors):
    write_gguf(path, {k: v for k, v in tensors.items() if k != "embed.weight"}, gguf_metadata())
    with pytest.raises(UserError, match="lacks the tensor token_embd.weight"):
        open_source(path)


def test_values_that_are_not_numbers(path, tensors):
    bad = tensors["norm.weight"].copy()
    bad[3] = np.nan
    write_gguf(path, tensors | {"norm.weight": bad}, gguf_metadata())
    with pytest.raises(UserError, match="output_norm.weight in .* has 1 NaN or infinite values of"):
        open_source(path).read("norm.weight")


def test_a_tensor_that_the_model_does_not_have(path, tensors):
    write_gguf(path, tensors, gguf_metadata())
    with pytest.raises(UserError, match="no tensor blocks.9.mlp.up.weight in"):
        open_source(path).read("blocks.9.mlp.up.weight")


def test_a_truncated_file(path, tensors):
    write_gguf(path, tensors, gguf_metadata())
    whole = path.read_bytes()
    for size in (5, 20, 100, 700, len(whole) // 2, len(whole) - 50):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="model.gguf .* truncated or corrupt"):
            open_source(path)


def test_another_machines_byte_order(path):
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UserError, match="has the byte order of another machine"):
        open_source(path)


def test_any_damaged_header_has_its_sentence(path, tensors):
    """Whatever a flipped byte does, nothing but UserError reaches the user."""
    write_gguf(path, tensors, gguf_metadata())
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for at in rng.integers(4, 4500, 120):
        damaged = bytearray(whole)
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            source = open_source(path)
            source.tokenizer()
            source.read("norm.weight")
        except UserError:
            refused += 1
    assert refused > 50


def test_the_digest_is_the_files(path, tensors, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    write_gguf(path, tensors, gguf_metadata())
    first = open_source(path).digest()
    write_gguf(path, tensors, gguf_metadata() | {"general.name": "other"})
    assert open_source(path).digest() != first


@pytest.fixture(scope="module")
def smollm2():
    return hydra.utils.instantiate(omegaconf.OmegaConf.load(ROOT / "conf/model/smollm2_135m.yaml"))


@pytest.mark.real
def test_the_embedded_model(smollm2):
    c = smollm2.config
    assert (c.layers, c.hidden, c.feed_forward, c.heads, c.kv_heads) == (30, 576, 1536, 9, 3)
    assert (c.head_size, c.vocabulary, c.context, c.rope_theta) == (64, 49152, 8192, 100000.0)
    assert c.norm_epsilon == 1e-5 and c.tied_embeddings and len(smollm2.names()) == 272
    assert sum(smollm2.read(name).size for name in smollm2.names()) == 134_515_008
    expected = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert smollm2.digest() == expected


@pytest.mark.real
def test_the_embedded_models_tensors(smollm2):
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2.location).tensors}
    for ours, theirs, heads in (("k", "attn_k", 3), ("q", "attn_q", 9), ("v", "attn_v", None)):
        tensor = stored[f"blk.7.{theirs}.weight"]
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if heads:
            expected = expected.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        read = smollm2.read(f"blocks.7.attention.{ours}.weight")
        np.testing.assert_array_equal(read, expected)


def with_key(path, value):
    """The file with one more key in front; value: its type and bytes."""
    whole = path.read_bytes()
    label = b"k" * (56 - len(value) % 32)  # what follows stays aligned
    tensors, keys = struct.unpack("<QQ", whole[8:24])
    key = struct.pack("<Q", len(label)) + label + value
    path.write_bytes(whole[:8] + struct.pack("<QQ", tensors, keys + 1) + key + whole[24:])


ARRAY, UINT8, STRING = 9, 0, 8


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IIQ", ARRAY, UINT8, 1 << 60),  # nothing is read there: a loop without an end
        struct.pack("<IIQ", ARRAY, STRING, 1 << 60),
        struct.pack("<IIQ", ARRAY, UINT8, 1_000_000),
        struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", 0, 0),
        struct.pack("<IQ", STRING, 1 << 63),
    ],
)
def test_what_a_file_does_not_hold_is_not_counted_through(path, tensors, value):
    write_gguf(path, tensors, gguf_metadata())
    with_key(path, value)
    with pytest.raises(UserError, match="model.gguf .* truncated or corrupt"):
        open_source(path)


def test_arrays_of_numbers_are_read_at_once(path, tensors):
    write_gguf(path, tensors, gguf_metadata())
    with_key(path, struct.pack("<IIQ3h", ARRAY, 3, 3, -1, 2, 300))
    (key,) = [key for key in open_source(path)._metadata.fields if key.startswith("kkk")]
    assert open_source(path)._metadata.get(key) == [-1, 2, 300]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"llama.block_count": 2**31}, "positive whole number"),
        ({"llama.block_count": 10**9}, "1000000000 layers and 21 tensors"),
        ({"llama.rope.freq_base": float("inf")}, "rope_theta=inf"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "damaged tokenizer"),
        ({"tokenizer.ggml.bos_token_id": "<s>"}, "damaged tokenizer"),
        ({"tokenizer.chat_template": 3}, "damaged tokenizer"),
    ],
)
def test_metadata_of_another_kind(path, tensors, changes, sentence):
    write_gguf(path, tensors, gguf_metadata() | changes)
    with pytest.raises(UserError, match=sentence):
        open_source(path).tokenizer()


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(UserError, match="model.gguf is missing or no ordinary file"):
        open_source(tmp_path / "model.gguf")
