import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.checkpoints import shards
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.planish import Checkpoint, CheckpointWriter, Part, digest, part_of
from experiments.checkpoints.sources import open_source
from experiments.errors import UserError
from experiments.recipes import Recipe
from experiments.streaming import Walk, compress_model
from models.config import DecoderConfig
from models.rope import RopeScaling
from tests.algorithms.integers import rtn
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import random_tensors


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    source = tiny.model(folder)
    write(source, folder / "checkpoint")
    return source, folder / "checkpoint"


def write(source, folder, **walk):
    writer = CheckpointWriter(folder)
    compress_model(source, writer, Recipe(rtn(bits=3, group_size=32)), None, Walk(**walk))
    writer.finish(source.config, source.tokenizer(), {"recipe": ["rtn"]})


def test_it_comes_back_as_it_was_written(compressed):
    source, folder = compressed
    checkpoint = open_source(folder)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.config == source.config
    assert checkpoint.names() == source.names()
    assert checkpoint.description["recipe"] == ["rtn"]
    w = jnp.asarray(source.read("blocks.1.mlp.down.weight"), jnp.float32)
    expected = rtn(bits=3, group_size=32).compress(w, None)
    found = checkpoint.tensor("blocks.1.mlp.down.weight")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    np.testing.assert_array_equal(
        checkpoint.read("embed.weight"), source.read("embed.weight").astype(np.float16)
    )
    text = "ab cd"
    assert checkpoint.tokenizer().encode(text) == source.tokenizer().encode(text)


def test_a_model_runs_on_its_packed_weights_without_the_source(compressed):
    _, folder = compressed
    checkpoint = open_source(folder)
    model = load_model(checkpoint)
    packed = [x for x in jax.tree.leaves(model) if x.dtype == jnp.uint8]
    assert len(packed) == 2 * 7 * checkpoint.config.layers  # codes and zero points of 7 layers
    logits = model(jnp.arange(12)[None])
    dense = load_model(open_source(folder))
    for block in dense.blocks:
        for part, names in ((block.attention, "qkvo"), (block.mlp, ("gate", "up", "down"))):
            for name in names:
                w = getattr(part, name).tensor.dequantize()
                setattr(part, name, lambda x, w=w: x @ w.T)
    np.testing.assert_allclose(logits, dense(jnp.arange(12)[None]), rtol=1e-4, atol=1e-4)


def test_every_architecture_survives(tmp_path):
    config = DecoderConfig(
        vocabulary=53, hidden=12, layers=2, heads=3, kv_heads=1, head_size=4, feed_forward=16,
        context=64, windows=(None, 5), tied_embeddings=True, qkv_bias=True, qk_norm=True,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    )  # fmt: skip
    writer, tensors = CheckpointWriter(tmp_path / "c"), random_tensors(config)
    for part in dict.fromkeys(map(part_of, tensors)):
        writer.write(part, {n: x for n, x in tensors.items() if part_of(n) == part})
    writer.finish(config, tiny.model(tmp_path).tokenizer(), {})
    assert open_source(tmp_path / "c").config == config


def test_a_writer_goes_on_where_an_interrupted_one_stopped(tmp_path):
    source = tiny.model(tmp_path)
    first = CheckpointWriter(tmp_path / "c")
    for name in ("norm", "head"):
        first.write(name, {f"{name}.weight": source.read(f"{name}.weight")})
    assert not (tmp_path / "c").exists()
    (first.partial / "parts" / ".embed.tmp").write_bytes(b"half")  # killed while it was written
    path = first.partial / "parts" / "head.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    again = CheckpointWriter(tmp_path / "c")
    assert set(again.parts) == {"norm"} and again.damaged == ["head"]
    assert again.parts["norm"] == first.parts["norm"]
    np.testing.assert_array_equal(
        again.read("norm").tensor("norm.weight"), source.read("norm.weight")
    )
    assert [path.name for path in (again.partial / "parts").iterdir()] == ["norm.safetensors"]


def test_an_existing_folder_is_never_overwritten(compressed):
    _, folder = compressed
    with pytest.raises(UserError, match="exists already"):
        CheckpointWriter(folder)


def test_the_same_input_gives_the_same_bytes(compressed, tmp_path):
    source, folder = compressed
    write(source, tmp_path / "again")
    first, again = (tiny.files(path) for path in (folder, tmp_path / "again"))
    assert first == again and len(first) > 5


def test_damage_is_one_sentence(compressed, tmp_path):
    source, _ = compressed
    folder = tmp_path / "c"
    write(source, folder)
    description = json.loads((folder / "planish.json").read_text())

    description["digests"]["norm"] = "0" * 64
    (folder / "planish.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="norm.safetensors does not match its SHA-256"):
        open_source(folder).read("norm.weight")

    path = folder / "parts" / "embed.safetensors"
    content = bytearray(path.read_bytes())
    for damaged in (b"", content[:-5], content[:-1] + bytes([content[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="embed.safetensors cannot be read, the checkpoint is"):
            open_source(folder).read("embed.weight")

    with pytest.raises(UserError, match="has no tensor head.bias"):
        open_source(folder).read("head.bias")

    description["format"] = 99
    (folder / "planish.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="has checkpoint format 99; this version reads format 3"):
        open_source(folder)

    (folder / "planish.json").write_text("{")
    with pytest.raises(UserError, match="planish.json is not a JSON object"):
        open_source(folder)


def test_a_dtype_too_narrow_is_refused(tmp_path):
    big = tiny.tensors()
    big["norm.weight"] = np.full_like(big["norm.weight"], 1e6)

    class Big(type(tiny.model(tmp_path))):
        def read(self, name):
            return big[name]

    with pytest.raises(UserError, match="norm.weight does not fit float16.*bfloat16"):
        write(Big(tmp_path / "model.gguf"), tmp_path / "refused")
    write(Big(tmp_path / "model.gguf"), tmp_path / "c", dense_dtype="bfloat16")
    assert open_source(tmp_path / "c").tensor("norm.weight").dtype == jnp.bfloat16


def forged(folder, change):
    """A checkpoint whose part was changed by somebody who put every digest right."""
    path = folder / "parts" / "blocks.0.safetensors"
    part = Part(path)
    change(part.described)
    found = digest(part.trees, part.described)
    arrays = {f"{n}:{field}": x for n, tree in part.trees.items() for field, x in tree.items()}
    note = json.dumps({"digest": found, "tensors": part.described})
    shards.save(path, {name: np.array(x) for name, x in arrays.items()}, {"planish": note})
    whole = json.loads((folder / "planish.json").read_text())
    whole["digests"]["blocks.0"] = found
    (folder / "planish.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "change",
    [
        lambda form: form.update(block=[1, 10**9]),  # which would be filled up with zeros
        lambda form: form.update(block=[0, 0]),
        lambda form: form.update(columns=10**12),
        lambda form: form.update({"class": "Format"}),
        lambda form: form.update({"class": "os.system"}),
        lambda form: form.pop("element"),
        lambda form: form["packed"].update(dtype="O"),
        lambda form: form.update(surprise=1),
    ],
)
def test_a_forged_form_is_one_sentence(compressed, tmp_path, change):
    source, _ = compressed
    write(source, tmp_path / "c")
    name = "blocks.0.mlp.up.weight"
    forged(tmp_path / "c", lambda described: change(described[name]["form"]))
    with pytest.raises(UserError, match=f"{name} in .* is damaged"):
        open_source(tmp_path / "c").read(name)


def test_a_description_of_another_model_is_refused(compressed, tmp_path):
    source, _ = compressed
    write(source, tmp_path / "c")
    path = tmp_path / "c" / "planish.json"
    whole = path.read_text()
    for key, value, sentence in (
        ("layers", 10**9, "too few for the 1000000000 layers"),
        ("layers", "2", "does not describe a model"),
        ("hidden", 32, "has shape .* where the model's configuration says"),
    ):
        description = json.loads(whole)
        description["architecture"][key] = value
        path.write_text(json.dumps(description))
        with pytest.raises(UserError, match=sentence):
            open_source(tmp_path / "c").read("norm.weight")
