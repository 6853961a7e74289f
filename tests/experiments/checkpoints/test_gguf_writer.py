"""GGUF files that planish writes, read back by planish and by the `gguf` package."""

import dataclasses
import json

import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from algorithms import formats
from algorithms.tensors import DenseTensor
from experiments.checkpoints import gguf_vocabulary
from experiments.checkpoints.gguf import stored_name
from experiments.checkpoints.gguf_tokenizer import PATTERNS, WORDS, read_tokenizer
from experiments.checkpoints.gguf_writer import GGUFWriter
from experiments.checkpoints.planish import part_of
from experiments.checkpoints.sources import open_source
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from models.rope import RopeScaling
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG, permute, random_tensors
from tests.experiments.data.test_tokenizer import HARD, byte_level, sentence_piece, spelled

FORMATS = {
    "Q4_0": formats.integer(bits=4, group_size=32, symmetric=True),
    "Q5_0": formats.integer(bits=4, group_size=32),
    "Q8_0": formats.integer(bits=8, group_size=32, symmetric=True),
    "MXFP4": formats.microscaling(),
}
ARCHITECTURES = {
    "plain": ("llama", {}),
    "tied": ("llama", {"tied_embeddings": True}),
    "biases": ("llama", {"qkv_bias": True, "output_bias": True, "mlp_bias": True}),
    "window": ("llama", {"windows": (16, 16)}),
    "no window": ("llama", {"windows": (None, None)}),
    "linear": ("llama", {"rope_scaling": RopeScaling(kind="linear", factor=4.0)}),
    "llama3": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": RopeScaling(kind="llama3", factor=32.0)},
    ),
    "qwen2": ("qwen2", {"qkv_bias": True, "norm_epsilon": 1e-6}),
    "qwen3": ("qwen3", {"qk_norm": True, "rope_theta": 1e6}),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("model")).tokenizer()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.gguf"


def write(path, config, tensors, tokenizer, *, last=None, **options):
    """Everything in parts; `last`: the part in front of which the writer stops."""
    writer = GGUFWriter(path, config, **options)
    parts = {}
    for name, x in tensors.items():
        parts.setdefault(part_of(name), {})[name] = x
    for part, content in parts.items():
        if part == last:
            return writer
        if part not in writer.parts:
            writer.write(part, content)
    writer.finish(config, tokenizer, {"recipe": ["rtn"]})
    return writer


def compressed(tensors, kind, config=CONFIG):
    """Every linear layer of the blocks on a grid."""
    return {
        name: FORMATS[kind].quantize(jnp.asarray(x)) if x.ndim == 2 and "blocks" in name else x
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_every_architecture_comes_back(path, tokenizer, case):
    architecture, changes = ARCHITECTURES[case]
    family = "mistral" if case == "window" else architecture
    config = dataclasses.replace(CONFIG, family=family, **changes)
    tensors = random_tensors(config)
    write(path, config, tensors, tokenizer)
    source = open_source(path)
    if case == "no window":
        config = dataclasses.replace(config, windows=None)
    assert source.config == config
    assert source.names() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(source.read(name), x)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == architecture
    stored = {t.name: t for t in reader.tensors}
    q = tensors["blocks.1.attention.q.weight"]
    q = permute(q, config.heads) if architecture == "llama" else q
    np.testing.assert_array_equal(stored["blk.1.attn_q.weight"].data, q)


@pytest.mark.parametrize("kind", FORMATS)
def test_compressed_tensors_come_back_bit_for_bit(path, tokenizer, kind):
    config = dataclasses.replace(CONFIG, qkv_bias=True, output_bias=True, mlp_bias=True)
    tensors = compressed(random_tensors(config), kind)
    write(path, config, tensors, tokenizer)
    source = open_source(path)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            np.testing.assert_array_equal(source.stored(name), tensor)
            continue
        assert types[stored_name(name)] == kind
        found, dense = source.stored(name), np.asarray(tensor.dequantize())
        np.testing.assert_array_equal(source.read(name), dense)
        np.testing.assert_array_equal(found.dequantize(), dense)
        if kind in ("Q4_0", "Q8_0"):
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tensor), strict=True):
                np.testing.assert_array_equal(a, b)


def test_rows_of_q_and_k_are_moved_as_codes(path, tokenizer):
    """llama.cpp sees the rows of each head as pairs, in the blocks as in the floats."""
    tensors = compressed(random_tensors(CONFIG), "Q4_0")
    write(path, CONFIG, tensors, tokenizer)
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, heads in (("q", CONFIG.heads), ("k", CONFIG.kv_heads)):
        x = stored[f"blk.0.attn_{name}.weight"]
        expected = permute(
            np.asarray(tensors[f"blocks.0.attention.{name}.weight"].dequantize()), heads
        )
        np.testing.assert_array_equal(gguf.quants.dequantize(x.data, x.tensor_type), expected)


def test_a_file_read_and_written_again_holds_the_same(path, tmp_path, tokenizer):
    """Whatever types a file has, its floats are written as they were read."""
    first = tmp_path / "first.gguf"
    write(first, CONFIG, compressed(random_tensors(CONFIG), "Q5_0"), tokenizer)
    source = open_source(first)
    again = {name: source.tensor(name) for name in source.names()}
    write(path, source.config, again, source.tokenizer())
    for name, x in again.items():
        np.testing.assert_array_equal(open_source(path).read(name), x)
    stored = {name: source.stored(name) for name in source.names()}
    write(tmp_path / "third.gguf", source.config, stored, source.tokenizer())
    assert (tmp_path / "third.gguf").read_bytes() == first.read_bytes()


def test_floats_keep_their_type_and_vectors_are_float32(path, tokenizer):
    tensors = {n: x.astype(np.float16) for n, x in random_tensors(CONFIG).items()}
    tensors["embed.weight"] = tensors["embed.weight"].astype(ml_dtypes.bfloat16)
    write(path, CONFIG, {n: jnp.asarray(x) for n, x in tensors.items()}, tokenizer)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == "BF16" and types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"
    for name, x in tensors.items():
        np.testing.assert_array_equal(open_source(path).read(name), x)


def test_metadata(path, tokenizer):
    write(path, CONFIG, compressed(random_tensors(CONFIG), "Q4_0"), tokenizer)
    fields = gguf.GGUFReader(path).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert json.loads(fields["planish.notes"].contents()) == {"recipe": ["rtn"]}
    assert "planish.dequantized" not in fields
    found = open_source(path).tokenizer()
    assert found.core.get_vocab() == tokenizer.core.get_vocab() | {"[PAD52]": 52}
    assert dataclasses.replace(found, core=tokenizer.core) == tokenizer


def test_a_writer_goes_on_where_an_interrupted_one_stopped(path, tmp_path, tokenizer):
    tensors = compressed(random_tensors(CONFIG), "Q4_0")
    whole = tmp_path / "whole.gguf"
    write(whole, CONFIG, tensors, tokenizer)
    assert not (tmp_path / "whole.gguf.partial").exists()

    first = write(path, CONFIG, tensors, tokenizer, last="head")
    assert not path.exists()
    parts = first.partial / "parts"
    (parts / ".norm.tmp").write_bytes(b"half")  # killed while it was written
    for name, at in (("blocks.0", -1), ("embed", 20)):
        content = bytearray((parts / f"{name}.ggml").read_bytes())
        content[at] ^= 1
        (parts / f"{name}.ggml").write_bytes(content)
    (first.partial / path.name).write_bytes(b"GGUF")  # killed in `finish`

    again = GGUFWriter(path, CONFIG)
    assert set(again.parts) == {"blocks.1"} and again.damaged == ["blocks.0", "embed"]
    assert again.parts["blocks.1"] == first.parts["blocks.1"]
    part = again.read("blocks.1")
    for name in ("blocks.1.attention.q.weight", "blocks.1.mlp.up.weight"):
        np.testing.assert_array_equal(part.tensor(name).dequantize(), tensors[name].dequantize())
    np.testing.assert_array_equal(
        part.tensor("blocks.1.mlp_norm.weight"), tensors["blocks.1.mlp_norm.weight"]
    )
    write(path, CONFIG, tensors, tokenizer)
    assert path.read_bytes() == whole.read_bytes()


def test_what_must_not_be_put_in_place_is_not(path, tokenizer):
    def check():
        raise RuntimeError("the run belongs to another process")

    writer = GGUFWriter(path, CONFIG, check=check)
    with pytest.raises(RuntimeError):
        writer.write("norm", {"norm.weight": np.ones(96, np.float32)})
    assert not writer.parts and not list((writer.partial / "parts").iterdir())


def test_a_fallback_is_stated_in_the_file(path, tmp_path, tokenizer):
    tensors = random_tensors(CONFIG)
    w = jnp.asarray(tensors["blocks.0.mlp.up.weight"])
    odd = formats.nf4(group_size=32).quantize(w)
    tensors |= {"blocks.0.mlp.up.weight": odd, "blocks.0.mlp.gate.weight": DenseTensor(w)}
    with pytest.raises(UserError, match="blocks.0.mlp.gate.weight: GGUF's blocks cannot hold a "
                       "DenseTensor"):  # fmt: skip
        write(path, CONFIG, tensors, tokenizer)
    write(path, CONFIG, tensors, tokenizer, fallback="f32")
    found = gguf.GGUFReader(path).fields["planish.dequantized"].contents()
    assert found == ["blocks.0.mlp.gate.weight", "blocks.0.mlp.up.weight"]
    np.testing.assert_array_equal(
        open_source(path).read("blocks.0.mlp.up.weight"), odd.dequantize()
    )
    half = tmp_path / "half.gguf"
    write(half, CONFIG, tensors, tokenizer, fallback="f16")
    np.testing.assert_array_equal(
        open_source(half).read("blocks.0.mlp.up.weight"),
        np.asarray(odd.dequantize()).astype(np.float16),
    )


def test_what_does_not_fit_a_float16(path):
    big = DenseTensor(jnp.full((64, 96), 1e6))
    writer = GGUFWriter(path, CONFIG, fallback="f16")
    with pytest.raises(UserError, match="up.weight does not fit F16: choose fallback=f32"):
        writer.write("blocks.0", {"blocks.0.mlp.up.weight": big})


def test_an_existing_file_is_never_overwritten(path):
    path.write_bytes(b"")
    with pytest.raises(UserError, match="out.gguf exists already"):
        GGUFWriter(path, CONFIG)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"windows": (16, None)}, "a sliding window in some layers only in the architecture llama"),
        ({"windows": (16, 16), "qkv_bias": True}, "sliding windows in the architecture qwen2"),
        ({"qk_norm": True, "qkv_bias": True}, "biases in the architecture qwen3"),
        (
            {"qk_norm": True, "rope_scaling": RopeScaling(kind="llama3", factor=8.0)},
            "Llama 3's rotary scaling in the architecture qwen3",
        ),
        (
            {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=4096)},
            "Llama 3's rotary scaling with other constants",
        ),
        (
            {"rope_scaling": RopeScaling(kind="llama3", factor=8.0), "rope_theta": 10.0},
            "Llama 3's rotary scaling by 8.0, which reaches no frequency",
        ),
    ],
)
def test_models_that_a_file_cannot_describe(path, changes, sentence):
    with pytest.raises(UserError, match=f"A GGUF file cannot say {sentence}"):
        GGUFWriter(path, dataclasses.replace(CONFIG, **changes))
    assert not path.with_name("out.gguf.partial").exists()


def test_a_fallback_that_is_none(path):
    with pytest.raises(UserError, match="fallback='q4' must be f16, f32 or null"):
        GGUFWriter(path, CONFIG, fallback="q4")


def again(tokenizer, rows=400):
    """A tokenizer through its metadata."""
    content = gguf_vocabulary.describe(tokenizer, rows)
    return read_tokenizer(lambda key, default=None: content.get(key, default), "model.gguf")


@pytest.mark.parametrize("pre", PATTERNS)
def test_byte_level_tokenizers_come_back(pre):
    tokenizer = byte_level(pre, **{"ggml.eot_token_id": 0, "ggml.add_bos_token": True})
    found = again(tokenizer)
    for text in HARD:
        assert spelled(found, text) == spelled(tokenizer, text)
        assert found.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert dataclasses.replace(found, core=tokenizer.core) == tokenizer
    assert found.stops == (2, 0)
    assert found.core.id_to_token(399) == "[PAD399]"


@pytest.mark.parametrize("spaced", [True, False])
def test_sentence_piece_tokenizers_come_back(spaced):
    tokenizer = sentence_piece(**{"ggml.add_space_prefix": spaced})
    found = again(tokenizer, tokenizer.core.get_vocab_size())
    assert found.core.to_str() == tokenizer.core.to_str()
    assert dataclasses.replace(found, core=tokenizer.core) == tokenizer


def core(**changes):
    """A byte-level core as SmolLM2's own tokenizer.json has it, to be changed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(alphabet)}, [], **changes.get("model", {}))
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = changes.get("steps", [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    if "normalizer" in changes:
        made.normalizer = changes["normalizer"]
    made.add_special_tokens([AddedToken("<s>", special=True, **changes.get("token", {}))])
    return made


def test_a_models_own_file_finds_its_name():
    tokenizer = Tokenizer(core=core())
    content = gguf_vocabulary.describe(tokenizer, 300)
    assert content["tokenizer.ggml.pre"] == "smollm"
    assert content["tokenizer.ggml.token_type"][256:258] == [3, 5]
    for text in HARD:
        assert spelled(again(tokenizer), text) == spelled(tokenizer, text)
    plain = core(steps=[pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert gguf_vocabulary.describe(Tokenizer(core=plain), 300)["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": [pre_tokenizers.ByteLevel(add_prefix_space=True)]}, "a way of cutting text"),
        ({"steps": [pre_tokenizers.Whitespace()]}, "a way of cutting text"),
        (
            {
                "steps": [
                    pre_tokenizers.Split(Regex(WORDS), "removed"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            },
            "a way of cutting text",
        ),
        ({"normalizer": normalizers.NFC()}, "the normalizer NFC beside the words of smollm"),
        ({"model": {"ignore_merges": True}}, "ignore_merges=True beside the words of smollm"),
        ({"model": {"end_of_word_suffix": "@"}}, "end_of_word_suffix='@'"),
        ({"token": {"lstrip": True}}, "the token <s>, which takes the spaces around it"),
    ],
)
def test_tokenizers_that_no_name_stands_for(changes, sentence):
    with pytest.raises(UserError, match=f"A GGUF file cannot hold .* with {sentence}"):
        gguf_vocabulary.describe(Tokenizer(core=core(**changes)), 300)


def test_more_tokenizers_that_a_file_cannot_hold():
    with pytest.raises(UserError, match="with 257 tokens for an embedding of 200 rows"):
        gguf_vocabulary.describe(Tokenizer(core=core()), 200)
    with pytest.raises(UserError, match="with 3 tokens beside eos"):
        gguf_vocabulary.describe(Tokenizer(core=core(), eos=1, stops=(1, 2, 3, 4)), 300)
    with pytest.raises(UserError, match="with model WordLevel, which is not BPE"):
        words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a"))
        gguf_vocabulary.describe(Tokenizer(core=words), 300)
    tokenizer = sentence_piece()
    content = json.loads(tokenizer.core.to_str())
    content["model"]["merges"].reverse()
    bad = tokenizers.Tokenizer.from_str(json.dumps(content))
    with pytest.raises(UserError, match="merges that no scores"):
        gguf_vocabulary.describe(Tokenizer(core=bad), 300)
    tokenizer.core.normalizer = normalizers.NFKC()
    with pytest.raises(UserError, match="another treatment of spaces"):
        gguf_vocabulary.describe(tokenizer, 300)
