"""Exports along with a checkpoint, of a finished run and of a checkpoint: the same bytes."""

import os
import time
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

from algorithms.tensors import BlockSparseTensor, CompressedTensor, SparseTensor
from experiments import compress, evaluate, export
from experiments.checkpoints import exports
from experiments.checkpoints.folder import FolderWriter
from experiments.checkpoints.planish import Checkpoint
from experiments.checkpoints.sources import open_source
from experiments.configuration import CONF
from experiments.errors import UserError
from experiments.report import label
from experiments.runs import run as runs
from experiments.runs.identity import identity
from tests.experiments import tiny
from tests.experiments.test_resume import process

RTN = ["algorithm=rtn", "algorithm.format.group_size=32"]
GPTQ = ["algorithm=gptq", "algorithm.format.group_size=32", "activations=int8_token",
        "rules=[{match: '.*attention.o', algorithm: null}]"]  # fmt: skip
CACHED = [*RTN, "scaling=awq", "cache=fp8"]
BESIDE = "export=compressed_tensors"
PLACE = Path("export") / "compressed_tensors"


def exported(checkpoint, out, *more):
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        config = hydra.compose("export", [f"checkpoint={checkpoint}", f"out={out}", *more])
    return export.run(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of each recipe that was exported along, by its settings."""
    folder, found = tmp_path_factory.mktemp("finished"), {}

    def run(*settings):
        if settings not in found:
            found[settings] = compress.run(tiny.config(folder, *settings, BESIDE))
        return found[settings]

    return run


@pytest.mark.parametrize("settings", [RTN, GPTQ, CACHED])
@pytest.mark.some(1)
def test_it_holds_what_the_checkpoint_holds(finished, settings):
    done = finished(*settings)
    source, checkpoint = open_source(done.folder / PLACE), open_source(done.checkpoint)
    assert source.config == checkpoint.config
    compressed = 0
    for name in checkpoint.names():
        found, expected = source.tensor(name), checkpoint.tensor(name)
        assert type(found) is type(expected) or not isinstance(expected, CompressedTensor)
        np.testing.assert_array_equal(source.read(name), checkpoint.read(name))
        compressed += isinstance(found, CompressedTensor)
    assert compressed == (12 if settings is GPTQ else 14)


@pytest.mark.parametrize("settings", [RTN, GPTQ, CACHED])
def test_it_is_the_same_made_of_the_finished_run(finished, tmp_path, settings):
    done = finished(*settings)
    out = exported(done.folder, tmp_path / "out")
    assert tiny.files(out) == tiny.files(done.folder / PLACE)
    assert not list(tmp_path.glob("*.partial"))
    card = (out / "README.md").read_text()
    assert f"Perplexity {done.record['metrics']['perplexity']['value']:.3f}" in card
    assert done.record["identity"] in card and done.record["model"]["digest"] in card


def test_it_evaluates_as_the_checkpoint_does(finished, config):
    done = finished(*GPTQ)
    again = evaluate.run(config(f"model.path={done.folder / PLACE}", name="evaluate"))
    found, expected = (r["metrics"]["perplexity"]["value"] for r in (again.record, done.record))
    assert found == expected


def test_a_folder_of_quantized_layers_is_not_called_float(finished, config):
    folder = finished(*RTN).folder / PLACE
    record = evaluate.run(config("model=local", f"model.path={folder}", name="evaluate")).record
    assert label(record) == "compressed-tensors"


def test_it_is_added_to_a_finished_run(finished, config):
    plain = compress.run(config(*RTN))
    assert not (plain.folder / "export").exists()
    again = compress.run(config(*RTN, BESIDE))
    assert again.folder == plain.folder
    assert tiny.files(again.folder / PLACE) == tiny.files(finished(*RTN).folder / PLACE)
    before = (again.folder / PLACE / "config.json").stat().st_mtime_ns
    compress.run(config(*RTN, BESIDE))
    assert (again.folder / PLACE / "config.json").stat().st_mtime_ns == before
    dense = compress.run(config(*RTN, "export=safetensors")).folder / "export"
    assert {path.name for path in dense.iterdir()} == {"compressed_tensors", "safetensors_float16"}


def test_it_leaves_the_run_what_it_is(config):
    plain, more = (compress.resolved(config(*RTN, *m)) for m in ([], [BESIDE]))
    before = {key: value for key, value in plain.items() if key != "export"}  # as it was recorded
    found = {identity("compress", c) for c in (plain, more, before)}
    assert len(found) == 1


@pytest.mark.parametrize(
    "part, when", [("blocks.1", "before"), ("blocks.1", "after"), ("norm", "before")]
)
@pytest.mark.some(1)
def test_an_interrupted_run_ends_with_the_same_bytes(config, finished, monkeypatch, part, when):
    original = FolderWriter.write

    def write(self, name, tensors):
        if when == "after" or name != part:
            original(self, name, tensors)
        if name == part:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FolderWriter, "write", write)
        compress.run(config(*GPTQ, BESIDE))
    done = compress.run(config(*GPTQ, BESIDE))
    assert tiny.files(done.folder / PLACE) == tiny.files(finished(*GPTQ).folder / PLACE)
    assert tiny.files(done.checkpoint) == tiny.files(finished(*GPTQ).checkpoint)
    assert not list(done.folder.rglob("*.partial"))


def test_a_part_of_an_interrupted_export_that_was_damaged(config, finished, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FolderWriter, "finish", interrupt)
        compress.run(config(*GPTQ, BESIDE))
    at = runs.place("compress", compress.resolved(config(*GPTQ, BESIDE)))
    (path,) = at.folder.glob("export/*.partial/model-00002-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = compress.run(config(*GPTQ, BESIDE))
    assert tiny.files(done.folder / PLACE) == tiny.files(finished(*GPTQ).folder / PLACE)
    assert "blocks.0 of the export was damaged" in done.record["warnings"][0]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_killed_process_loses_nothing(tmp_path, config, finished):
    """First once a part is written, then wherever it is."""
    running = process(tmp_path, *GPTQ, BESIDE)
    while not any(tmp_path.glob("runs/compress/*/*/export/*.partial/model-00002-*")):
        assert running.poll() is None
        time.sleep(0.001)
    running.kill()
    running.communicate()
    for seconds in (0.5, 3.0):
        running = process(tmp_path, *GPTQ, BESIDE)
        time.sleep(seconds)
        running.kill()
        running.communicate()
    done = compress.run(config(*GPTQ, BESIDE))
    assert tiny.files(done.folder / PLACE) == tiny.files(finished(*GPTQ).folder / PLACE)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["correction=lqer", "correction.rank=2"], "blocks.0.*: .*no place for a low-rank sum"),
        (["rotation=quarot"], "no place for a rotation while the model runs"),
        (["algorithm.format.zero_dtype=float16"], "zero_dtype=uint8"),
        (["activations=nvfp4"], "activations=nvfp4_static"),
        (
            ["rules=[{match: embed, algorithm: {format: {group_size: 32}}}]"],
            "embed: a compressed embedding is nothing that loaders",
        ),
        (["export=safetensors", "activations=int8_token"], "a dense weight does not round"),
        (["export=gptq", "cache=fp8"], "gptq has no place for the scales of keys and values"),
        (["export=gguf", "cache=int8"], "GGUF has no place for the scales of keys and values"),
        (["export=safetensors", "cache=fp8"], "no place for the scales of keys and values"),
    ],
)
@pytest.mark.some(3)
def test_what_it_cannot_hold_is_refused_before_anything_is_computed(
    config, tmp_path, monkeypatch, settings, sentence
):
    monkeypatch.setattr(compress.streaming, "compress_model", interrupt)
    with pytest.raises(UserError, match=sentence) as caught:
        compress.run(config(*RTN, BESIDE, *settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (["algorithm=quip_sharp", "algorithm.bits=2"], "no place for points of a lattice"),
        (["algorithm=svd_llm"], "no place for a product of two matrices"),
        (["algorithm=oats"], "no place for a low-rank sum .* another algorithm than oats"),
    ],
)
def test_an_algorithm_without_a_format_is_refused(config, tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        compress.run(config(*settings, BESIDE))
    assert not (tmp_path / "runs").exists()


def test_a_head_of_its_own_bits_is_exported(config):
    rule = "rules=[{match: head, algorithm: {format: {bits: 8}}}]"
    done = compress.run(config(*RTN, BESIDE, rule))
    source = open_source(done.folder / PLACE)
    assert source.tensor("head.weight").bits == 8
    assert source.tensor("blocks.0.mlp.up.weight").bits == 4


def test_what_a_checkpoint_holds_is_refused_too(config, tmp_path):
    done = compress.run(config(*RTN, "correction=lqer", "correction.rank=2"))
    with pytest.raises(UserError, match="no place for a low-rank sum"):
        exported(done.folder, tmp_path / "out")
    out = exported(done.folder, tmp_path / "out", "format=safetensors", "format.dtype=float32")
    source, checkpoint = open_source(out), open_source(done.checkpoint)
    for name in checkpoint.names():
        np.testing.assert_array_equal(source.read(name), checkpoint.read(name))


def test_a_path_without_a_checkpoint_is_refused(tmp_path, finished):
    with pytest.raises(UserError, match="holds no checkpoint that planish wrote: name"):
        exported(tmp_path, tmp_path / "out")
    done = finished(*RTN)
    with pytest.raises(UserError, match="exists already: choose another output folder"):
        exported(done.folder, tmp_path)
    assert exported(done.folder.parent, tmp_path / "out")  # of its one seed


def test_a_dtype_that_there_is_not_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="dtype='int8' must be one of float16, bfloat16, float32"):
        exported(finished(*RTN).folder, tmp_path / "out", "format=safetensors", "format.dtype=int8")


@pytest.mark.parametrize("name", sorted(p.stem for p in Path(CONF, "format").glob("*.yaml")))
def test_a_format_is_what_is_exported_along(name):
    """conf/format and conf/export have the same choices, none aside."""
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        alone = hydra.compose("export", [f"format={name}", "checkpoint=x", "out=y"]).format
        along = hydra.compose("compress", [f"export={name}"]).export
    assert OmegaConf.to_container(alone) == OmegaConf.to_container(along)
    assert {p.stem for p in Path(CONF, "export").glob("*.yaml")} == {
        "none", *(p.stem for p in Path(CONF, "format").glob("*.yaml")),
    }  # fmt: skip


def test_the_command_says_where_it_wrote(finished, tmp_path):
    done = tiny.command(
        "experiments.export", f"checkpoint={finished(*RTN).folder}", f"out={tmp_path / 'out'}",
        cwd=tmp_path, COLUMNS="200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"export: {tmp_path / 'out'}" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_gguf_file_is_written_along_and_of_a_finished_run(config, tmp_path):
    grid = ["algorithm=rtn", "bits=4", "algorithm.format.group_size=32"]
    done = compress.run(config(*grid, "export=gguf"))
    path = done.folder / "export" / "model.gguf"
    again = exported(done.checkpoint, tmp_path / "again.gguf", "format=gguf")
    assert again.read_bytes() == path.read_bytes()
    source, checkpoint = open_source(path), open_source(done.checkpoint)
    for name in checkpoint.names():
        np.testing.assert_array_equal(source.read(name), checkpoint.read(name))


def test_a_partial_gguf_file_of_something_else_is_begun_anew(config, tmp_path):
    grid = ["algorithm=rtn", "algorithm.format.group_size=32", "algorithm.format.symmetric=true",
            "export=gguf"]  # fmt: skip
    one, two = (compress.run(config(*grid, f"bits={bits}")) for bits in (4, 8))
    out = tmp_path / "out.gguf"
    writer = exports.gguf().writer(out, tiny.CONFIG, origin="another", check=lambda: None)
    checkpoint = Checkpoint(one.checkpoint)
    writer.write("embed", {"embed.weight": checkpoint.tensor("embed.weight")})
    written = exported(two.checkpoint, out, "format=gguf")
    assert written.read_bytes() == (two.folder / "export" / "model.gguf").read_bytes()
    assert not list(tmp_path.glob("out.gguf.partial"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["algorithm.format.group_size=16", "bits=4"], "GGUF's blocks cannot hold .*fallback=f16"),
        (["algorithm.format.group_size=32", "activations=int8_token"], "changes its input as it"),
        (["algorithm.format.group_size=32", "export.fallback=q4"], "fallback='q4' must be f16"),
    ],
)
def test_what_gguf_does_not_hold_is_refused(overrides, sentence, config):
    with pytest.raises(UserError, match=sentence):
        compress.run(config("algorithm=rtn", "export=gguf", *overrides))


PRUNED = {
    "bits for zeros": ("algorithm=magnitude", BESIDE, "export.sparse=bitmask"),
    "2:4": ("algorithm=magnitude", "algorithm.keep=2", "algorithm.block=4", BESIDE,
            "export.sparse=bitmask"),
    "codes of zeros": (*RTN, "algorithm@pruning=magnitude", BESIDE),
    "codes in GGUF": (*RTN, "algorithm@pruning=magnitude", "export=gguf"),
    "numbers in GGUF": ("algorithm=magnitude", "export=gguf"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.some(2)
def test_pruned_weights_leave_bit_for_bit(config, name):
    done = compress.run(config(*PRUNED[name]))
    (path,) = (done.folder / "export").iterdir()
    source, checkpoint = open_source(path), open_source(done.checkpoint)
    for tensor in checkpoint.names():
        np.testing.assert_array_equal(source.read(tensor), checkpoint.read(tensor))
    sparse = isinstance(source.tensor("blocks.0.mlp.up.weight"), SparseTensor | BlockSparseTensor)
    assert sparse is ("export.sparse=bitmask" in PRUNED[name])
    if sparse:
        assert "compressed-tensors<0.15" in (path / "README.md").read_text()


def test_pruned_weights_without_codes_are_refused_where_loaders_are_of_today(config, tmp_path):
    with pytest.raises(UserError, match="weights without their zeros since its version 0.15"):
        compress.run(config("algorithm=magnitude", BESIDE))
    assert not (tmp_path / "runs").exists()


def test_what_no_block_holds_is_stored_dense_if_asked_for(config):
    done = compress.run(config("algorithm=rtn", "algorithm.format.group_size=16", "export=gguf",
                               "export.fallback=f32"))  # fmt: skip
    source, checkpoint = (open_source(p) for p in (done.folder / "export" / "model.gguf",
                                                   done.checkpoint))  # fmt: skip
    name = "blocks.0.mlp.up.weight"
    np.testing.assert_array_equal(source.read(name), checkpoint.read(name))
