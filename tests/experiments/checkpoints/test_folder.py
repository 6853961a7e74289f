"""A Hugging Face folder is written part by part, whole or not at all, the same bytes every time."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import formats
from algorithms.tensors import CompressedTensor, DenseTensor
from experiments.checkpoints import folder, shards
from experiments.checkpoints.folder import FolderWriter
from experiments.checkpoints.layouts.compressed_tensors import CompressedTensors
from experiments.checkpoints.planish import part_of
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG

TIED = dataclasses.replace(CONFIG, tied_embeddings=True)
FORMAT = formats.integer(group_size=32)


def parts(config=CONFIG, format=FORMAT):
    """A model's tensors by part, those of layers quantized; a dense layer in a compressed form."""
    found = {}
    for name, x in tiny.tensors(config).items():
        layer = name.startswith("blocks.") and x.ndim == 2
        tensor = format.quantize(jnp.asarray(x)) if layer else x.astype(np.float16)
        if name == "blocks.1.mlp.up.weight":
            tensor = DenseTensor(jnp.asarray(x, jnp.float16))
        found.setdefault(part_of(name), {})[name] = tensor
    return found


def writer(place, config=CONFIG, layout=CompressedTensors, **more):
    return FolderWriter(place, config, layout and layout(), **more)


def write(place, tokenizer, config=CONFIG, **more):
    made = writer(place, config, **more)
    for part, tensors in parts(config).items():
        made.write(part, tensors)
    made.finish(config, tokenizer, {"recipe": ["rtn"]})
    return open_source(place)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return dataclasses.replace(
        tiny.model(tmp_path_factory.mktemp("model")).tokenizer(),
        chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}ü{% endfor %}",
        stops=(2, 5),
    )


@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_it_comes_back_as_it_was_written(tmp_path, tokenizer, config):
    source = write(tmp_path / "f", tokenizer, config)
    assert source.config == config
    for tensors in parts(config).values():
        for name, tensor in tensors.items():
            found = source.tensor(name)
            if isinstance(tensor, CompressedTensor) and not isinstance(tensor, DenseTensor):
                assert isinstance(found, CompressedTensor)
                tensor = tensor.dequantize()
            elif isinstance(tensor, DenseTensor):
                tensor = tensor.weight
            np.testing.assert_array_equal(source.read(name), tensor)
    said = json.loads((tmp_path / "f" / "config.json").read_text())
    assert said["torch_dtype"] == "float16"
    assert said["quantization_config"]["ignore"] == ["model.layers.1.mlp.up_proj", "lm_head"]


def test_the_tokenizer_comes_back(tmp_path, tokenizer):
    found = write(tmp_path / "f", tokenizer).tokenizer()
    for field in ("chat_template", "bos", "eos", "add_bos", "stops"):
        assert getattr(found, field) == getattr(tokenizer, field)
    assert found.encode("ab cd") == tokenizer.encode("ab cd")
    message = [{"role": "user", "content": "ab"}]
    assert found.chat(message) == tokenizer.chat(message)


def test_files_are_named_in_order_and_indexed(tmp_path, tokenizer):
    write(tmp_path / "f", tokenizer)
    names = sorted(path.name for path in (tmp_path / "f").glob("*.safetensors"))
    assert names == [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    index = json.loads((tmp_path / "f" / "model.safetensors.index.json").read_text())
    where = index["weight_map"]
    assert where["model.embed_tokens.weight"] == names[0]
    assert where["model.layers.1.mlp.down_proj.weight_packed"] == names[2]
    assert where["lm_head.weight"] == names[3] and where["model.norm.weight"] == names[4]
    entries = [shards.read_header(tmp_path / "f" / name) for name in names]
    assert set(where) == {name for file in entries for name in file}
    stored = sum(e.stop - e.start for file in entries for e in file.values())
    assert index["metadata"]["total_size"] == stored
    metadata = shards.read_metadata(tmp_path / "f" / names[0])
    assert metadata["format"] == "pt"  # without which transformers refuses the file


def test_without_a_layout_every_weight_is_dense(tmp_path, tokenizer):
    source = write(tmp_path / "f", tokenizer, layout=None, dtype="bfloat16")
    for tensors in parts().values():
        for name, tensor in tensors.items():
            dense = tensor.dequantize() if isinstance(tensor, CompressedTensor) else tensor
            np.testing.assert_array_equal(source.read(name), np.asarray(dense).astype(jnp.bfloat16))
    said = json.loads((tmp_path / "f" / "config.json").read_text())
    assert said["torch_dtype"] == "bfloat16" and "quantization_config" not in said


def test_what_is_not_compressed_has_no_quantization(tmp_path, tokenizer):
    made = writer(tmp_path / "f")
    for part, tensors in parts().items():
        made.write(part, {n: np.zeros(t.shape, np.float32) for n, t in tensors.items()})
    made.finish(CONFIG, tokenizer, {})
    said = json.loads((tmp_path / "f" / "config.json").read_text())
    assert "quantization_config" not in said and said["torch_dtype"] == "float32"


def test_a_writer_goes_on_where_an_interrupted_one_stopped(tmp_path, tokenizer):
    write(tmp_path / "whole", tokenizer)
    made, first = parts(), writer(tmp_path / "f")
    for part in ("embed", "blocks.0", "blocks.1", "norm"):
        first.write(part, made[part])
    (first.partial / ".model-00005-of-00005.tmp").write_bytes(b"half")  # killed while writing it
    path = first.partial / "model-00002-of-00005.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not (tmp_path / "f").exists()

    again = writer(tmp_path / "f")
    assert set(again.parts) == {"embed", "blocks.1", "norm"} and again.damaged == ["blocks.0"]
    for part in ("blocks.0", "head"):
        again.write(part, made[part])
    again.finish(CONFIG, tokenizer, {"recipe": ["rtn"]})
    assert tiny.files(tmp_path / "f") == tiny.files(tmp_path / "whole")
    assert not again.partial.exists()


@pytest.mark.parametrize("lost", [".origin.json", "config.json"])
def test_killed_while_it_was_finished(tmp_path, tokenizer, monkeypatch, lost):
    """At its last step, the mark is gone and the name is not yet given."""
    write(tmp_path / "whole", tokenizer)
    made = writer(tmp_path / "f")
    for part, tensors in parts().items():
        made.write(part, tensors)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(folder.os, "replace", interrupted(folder.os.replace, made.partial))
        made.finish(CONFIG, tokenizer, {"recipe": ["rtn"]})
    (made.partial / lost).unlink(missing_ok=True)
    again = writer(tmp_path / "f")
    assert len(again.parts) == 5
    again.finish(CONFIG, tokenizer, {"recipe": ["rtn"]})
    assert tiny.files(tmp_path / "f") == tiny.files(tmp_path / "whole")


def interrupted(replace, partial):
    def stop(source, target):
        if source == partial:
            raise KeyboardInterrupt
        replace(source, target)

    return stop


@pytest.mark.parametrize(
    "other", [{"origin": "another"}, {"dtype": "bfloat16"}, {"layout": None, "dtype": "float16"}]
)
def test_parts_of_something_else_are_not_gone_on_with(tmp_path, other):
    first = writer(tmp_path / "f", origin="one")
    first.write("embed", parts()["embed"])
    assert set(writer(tmp_path / "f", origin="one").parts) == {"embed"}
    assert not writer(tmp_path / "f", **{"origin": "one", **other}).parts
    assert not list(first.partial.glob("*.safetensors"))


def test_what_it_refuses(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "f", tokenizer)
    with pytest.raises(UserError, match="exists already: choose another output folder"):
        writer(tmp_path / "f")
    name = "blocks.0.mlp.down.weight"
    w = jnp.full((96, 64), 1e6)
    made = writer(tmp_path / "g", layout=None, dtype="float16")
    wide = formats.integer(group_size=32, scale_dtype="float32").quantize(w)
    with pytest.raises(UserError, match=f"{name} does not fit float16.*Choose bfloat16"):
        made.write("blocks.0", {name: wide})
    with pytest.raises(UserError, match="mlp.down_proj: compressed-tensors has no NormalFloat"):
        writer(tmp_path / "g").write("blocks.0", {name: formats.nf4().quantize(w)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save", full)
    with pytest.raises(UserError, match="No space left on device.*run the same command again"):
        writer(tmp_path / "g").write("norm", {"norm.weight": np.ones(96, np.float32)})


def test_a_claim_that_was_lost_puts_nothing_in_place(tmp_path, tokenizer):
    def lost():
        raise UserError("taken over")

    made = writer(tmp_path / "f", check=lost)
    with pytest.raises(UserError, match="taken over"):
        made.write("norm", parts()["norm"])
    assert not list(made.partial.glob("*.safetensors"))


def damage(place, change):
    path = place / "config.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def test_what_does_not_fit_its_description_is_one_sentence(tmp_path, tokenizer):
    place, name = tmp_path / "f", "blocks.0.attention.q.weight"
    write(place, tokenizer)

    def narrower(said):
        said["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 3

    damage(place, narrower)
    with pytest.raises(UserError, match="q_proj in .* is not what compressed-tensors stores .*wei"):
        open_source(place).tensor(name)
    damage(place, lambda said: said["quantization_config"].pop("config_groups"))
    with pytest.raises(UserError, match="quantization_config that planish does not read: its conf"):
        open_source(place)
    damage(place, lambda said: said.update(quantization_config={"quant_method": "fp6"}))
    with pytest.raises(UserError, match=r"already quantized \(fp6\)"):
        open_source(place)


def test_a_layer_of_another_shape_is_one_sentence(tmp_path, tokenizer):
    made = writer(tmp_path / "f")
    for part, tensors in parts().items():
        q = "blocks.0.attention.q.weight"
        if q in tensors:
            tensors[q] = FORMAT.quantize(jnp.ones((32, 96)))
        made.write(part, tensors)
    made.finish(CONFIG, tokenizer, {})
    with pytest.raises(UserError, match=r"shape \(32, 96\) where config.json says \(96, 96\)"):
        open_source(tmp_path / "f").read("blocks.0.attention.q.weight")
