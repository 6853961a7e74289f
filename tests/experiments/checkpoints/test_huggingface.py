"""Hugging Face folders: what their configurations mean, and every way they can be wrong."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from experiments.checkpoints.huggingface import HuggingFaceFolder, read_config
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from models.rope import RopeScaling
from tests.experiments.checkpoints.synthetic import LLAMA, shard, write_folder

MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_SCALING = RopeScaling(kind="llama3", factor=8.0, original_context=64)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))


def config(raw, tmp_path, **changes):
    return read_config(raw | changes, tmp_path / "config.json")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_come_back_as_written(tmp_path, dtype, sharded):
    written = write_folder(tmp_path, LLAMA, dtype=dtype)
    if sharded:
        shard(tmp_path)
    source = open_source(tmp_path)
    assert source.names() == written.keys()
    for name, x in written.items():
        read = source.read(name)
        assert read.dtype == dtype
        np.testing.assert_array_equal(read, x)


def test_tensors_are_views_of_the_file(tmp_path):
    write_folder(tmp_path, LLAMA)
    x = open_source(tmp_path).read("blocks.0.mlp.up.weight")
    assert isinstance(x, np.memmap) and not x.flags.writeable


def test_llama(tmp_path):
    c = config(LLAMA, tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert (c.vocabulary, c.hidden, c.layers, c.heads, c.kv_heads) == (53, 96, 2, 3, 1)
    assert (c.head_size, c.feed_forward, c.context, c.norm_epsilon) == (32, 64, 128, 1e-5)
    assert c.qkv_bias and c.output_bias and c.mlp_bias and c.tied_embeddings
    assert not c.qk_norm and c.windows is None and c.rope_scaling is None
    assert config(LLAMA, tmp_path, head_dim=20).head_size == 20
    without = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert config(without, tmp_path).kv_heads == 3


def test_mistral_slides_in_every_layer(tmp_path):
    assert config(MISTRAL, tmp_path, sliding_window=16).windows == (16, 16)
    assert config(MISTRAL, tmp_path, sliding_window=None).windows is None
    assert config(MISTRAL, tmp_path).windows == (4096, 4096)  # transformers' default


def test_qwen_slides_where_it_says(tmp_path):
    sliding = {"use_sliding_window": True, "sliding_window": 16}
    assert config(QWEN2, tmp_path, sliding_window=16).windows is None
    assert config(QWEN2, tmp_path, **sliding, max_window_layers=1).windows == (None, 16)
    kinds = ["sliding_attention", "full_attention"]
    assert config(QWEN3, tmp_path, **sliding, layer_types=kinds).windows == (16, None)


def test_qwen_biases_and_norms(tmp_path):
    two, three = config(QWEN2, tmp_path), config(QWEN3, tmp_path, head_dim=None)
    assert two.qkv_bias and not two.output_bias and not two.qk_norm
    assert three.qk_norm and not three.qkv_bias and three.head_size == 128


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, ("linear", 2.0)),
        ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3}, 1e4, LLAMA3_SCALING),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3},
            5e5,
            LLAMA3_SCALING,
        ),
    ],
)
def test_rotary_positions_in_both_spellings(tmp_path, changes, theta, scaling):
    c = config(LLAMA, tmp_path, **changes)
    expected = (
        RopeScaling(kind=scaling[0], factor=scaling[1]) if type(scaling) is tuple else scaling
    )
    assert (c.rope_theta, c.rope_scaling) == (theta, expected)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            "architecture BloomForCausalLM.*it runs LlamaFor",
        ),
        ({"architectures": None, "model_type": "t5"}, "architecture unstated"),
        ({"quantization_config": {"quant_method": "hqq"}}, r"already quantized \(hqq\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' where planish runs 'silu' or 'swish' only"),
        ({"vocab_size": "many"}, "vocab_size='many' where a positive whole number"),
        ({"hidden_size": None}, "hidden_size=None where a positive whole number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"does not run \(yarn\)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not of this family"),
        ({"rope_parameters": {"full_attention": {}}}, "one per kind of layer"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "incomplete rotary .*low_freq"),
        ({"num_key_value_heads": 2}, "does not describe a model: kv_heads=2 must divide heads=3"),
    ],
)
def test_a_model_that_planish_does_not_run(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        config(LLAMA, tmp_path, **changes)


def test_an_unknown_kind_of_layer(tmp_path):
    with pytest.raises(UserError, match="layers of type chunked_attention"):
        config(QWEN2, tmp_path, layer_types=["chunked_attention"] * 2)


def change(folder, **tensors):
    """Replace tensors of a folder, or take them away (None)."""
    path = folder / "model.safetensors"
    stored = safetensors.numpy.load_file(path) | tensors
    safetensors.numpy.save_file({k: v for k, v in stored.items() if v is not None}, path)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"model.norm.weight": None}, "lacks the tensor model.norm.weight"),
        ({"lm_head.weight": None}, "lacks the tensor lm_head.weight"),
        (
            {"model.norm.weight": np.ones(5, np.float32)},
            r"model.norm.weight in .* has shape \(5,\)",
        ),
        ({"model.norm.weight": np.ones(96, np.float64)}, "stored as F64 where planish reads F32"),
    ],
)
def test_wrong_tensors_are_refused_on_opening(tmp_path, tensors, sentence):
    write_folder(tmp_path, LLAMA)
    change(tmp_path, **tensors)
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_numbers(tmp_path, bad):
    write_folder(tmp_path, LLAMA)
    change(tmp_path, **{"model.norm.weight": np.array([bad] + [1.0] * 95, np.float32)})
    source = open_source(tmp_path)
    source.read("embed.weight")
    with pytest.raises(
        UserError, match="model.norm.weight in .* has 1 NaN or infinite values of 96"
    ):
        source.read("norm.weight")


def test_a_tensor_that_the_model_does_not_have(tmp_path):
    write_folder(tmp_path, LLAMA)
    with pytest.raises(UserError, match="no tensor blocks.9.mlp.up.weight in"):
        open_source(tmp_path).read("blocks.9.mlp.up.weight")


def raw_file(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<Q", 1 << 60) + b"{}",
        raw_file(b"not json"),
        raw_file(b"[]"),
        raw_file(b'{"a": 1}'),
        raw_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234"),
        raw_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}', b"12345678"),
        raw_file(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', b"12345678"),
        raw_file(
            b'{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}', b"12345678"
        ),
    ],
)
def test_damaged_safetensors(tmp_path, content):
    write_folder(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupt"):
        open_source(tmp_path)


def test_truncated_safetensors(tmp_path):
    write_folder(tmp_path, LLAMA)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupt"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "sentence"),
    [
        ({"a": "../secret.safetensors"}, "'../secret.safetensors', which lies outside its folder"),
        ({"a": "/etc/secret"}, "'/etc/secret', which lies outside"),
        ({"a": "C:\\secret"}, "which lies outside"),
        ({"a": "absent.safetensors"}, "lacks the file absent.safetensors that its index names"),
        ({}, "is not an index of safetensors .its weight_map names no files"),
        ({"a": 3}, "is not an index"),
        ([], "is not an index"),
    ],
)
def test_a_wrong_index(tmp_path, weight_map, sentence):
    write_folder(tmp_path, LLAMA)
    shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path)


def test_no_safetensors(tmp_path):
    write_folder(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match="neither model.safetensors nor .* planish reads safetensors"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_damaged_config(tmp_path, content):
    write_folder(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is not a JSON object"):
        open_source(tmp_path)


def test_the_digest_follows_the_content(tmp_path, cached):
    for name in ("a", "b"):
        write_folder(tmp_path / name, LLAMA)
    first = open_source(tmp_path / "a").digest()
    assert len(first) == 64
    assert open_source(tmp_path / "b").digest() == first
    change(tmp_path / "b", **{"model.norm.weight": np.ones(96, np.float32)})
    assert open_source(tmp_path / "b").digest() != first
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_source_names_its_place(tmp_path):
    write_folder(tmp_path, LLAMA)
    assert HuggingFaceFolder(tmp_path).location == str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, "up to 10000 layers"),
        ({"num_hidden_layers": 10_000}, "tensors, too few for the 10000 layers"),
        ({"vocab_size": 10**12}, "positive whole number"),
        ({"num_key_value_heads": "1"}, "does not describe a model"),
        ({"head_dim": -32}, "head_size=-32 must be a positive whole number"),
        ({"rope_theta": "x"}, "incomplete rotary parameters"),
        ({"rope_scaling": 3}, "does not describe a model"),
        ({"rope_scaling": {"rope_type": []}}, "does not describe a model"),
        ({"architectures": [["x"]]}, "has the architecture"),
        ({"architectures": {}}, "has the architecture|describe"),
        ({"quantization_config": {"quant_method": []}}, "does not describe a model"),
    ],
)
def test_settings_of_another_kind(tmp_path, changes, sentence):
    write_folder(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    with pytest.raises(UserError, match=sentence):
        open_source(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    write_folder(tmp_path / "model", LLAMA)
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to("../elsewhere")
    with pytest.raises(UserError, match="model.safetensors leads outside its folder"):
        open_source(tmp_path / "model")
