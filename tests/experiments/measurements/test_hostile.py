"""The fuzz target: it finds nothing in the readers, and finds what is planted there."""

import collections
import json
import os
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.checkpoints import huggingface, shards
from experiments.errors import UserError
from experiments.measurements.hostile import campaign, corpus, gguf_edits, mutations, target, worker

SETTINGS = {"files": 120, "seconds": 20.0, "memory": 1 << 31}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    return corpus.make(folder)


@pytest.fixture
def whole(models):
    """A model that nothing was done to, cheap to read."""
    return models["llama-shards"]


def test_nothing_is_found_in_the_readers(models, tmp_path):
    """In a process of its own, as ever: there no types are checked but by the readers."""
    place = models["bert"].parents[2]
    found = campaign.portion(1, 0, SETTINGS["files"], SETTINGS, place, tmp_path, models)
    assert [row for row in found if row["verdict"] == target.FINDING] == []
    assert {row["verdict"] for row in found} == {target.ACCEPTED, target.REFUSED}
    assert {row["kind"] for row in found} == set(mutations.KINDS)
    assert [row["index"] for row in found] == list(range(SETTINGS["files"]))


def test_a_file_is_damaged_the_same_way_again(models, tmp_path):
    for index in range(40):
        made = []
        for box in (tmp_path / f"a{index}", tmp_path / f"b{index}"):
            (box / mutations.OUTSIDE).mkdir(parents=True)
            drawn = mutations.draw(3, index, models)
            path = mutations.damage(drawn, 3, index, models, box)
            held = [p for p in corpus.files(path) if p.resolve().is_relative_to(path)]
            made.append({p.relative_to(box): p.read_bytes() for p in held})
        assert made[0] == made[1]


def test_every_model_is_read_whole(models):
    for name, path in models.items():
        assert target.examine(path, 60.0, {}) == target.Verdict(target.ACCEPTED), name
        assert corpus.describe(name, path)["files"] == len(corpus.files(path))


def raise_key_error(*_):
    return {}["planted"]


def read_outside(*_):
    (Path(__file__).parents[3] / "README.md").read_bytes()
    raise UserError("nothing.")


def write_outside(*_):
    Path(os.environ["PLANTED"]).write_text("x")
    raise UserError("nothing.")


def connect(*_):
    socket.socket().close()


def say(message):
    def refuse(*_):
        raise UserError(message)

    return refuse


@pytest.mark.parametrize(
    ("planted", "detail"),
    [
        (raise_key_error, "KeyError: 'planted'"),
        (lambda *_: time.sleep(30), "took longer than 0.3 s"),
        (lambda *_: np.zeros(1 << 60, np.uint8), "asked for too much memory"),
        (read_outside, "open .*README.md"),
        (write_outside, "open .*planted for writing"),
        (connect, "socket.__new__"),
        (lambda *_: os.system("true"), "os.system"),
        (say("nothing is wrong."), "does not name the file"),
        (say("The model's file breaks off"), "does not end"),
        (say("The model's Traceback (most recent call last) is long."), "insides of the program"),
    ],
)
def test_what_is_planted_is_found(whole, monkeypatch, tmp_path, planted, detail):
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    monkeypatch.setattr(huggingface.HuggingFaceFolder, "read", planted)
    found = target.examine(whole, 0.3, {})
    assert found.kind == target.FINDING
    assert re.search(detail, found.detail)


def test_a_refusal_is_one_readable_line():
    assert (
        target.complaint("/a/model.gguf is short: fetch it again.", Path("/a/model.gguf")) is None
    )
    assert target.complaint("/a is\nshort.", Path("/a")) == "a refusal of several lines"
    assert target.complaint("/a" + "x" * 9000 + ".", Path("/a")) == "a refusal without bounds"


def test_a_process_that_dies_is_a_finding_of_its_file(models, tmp_path, monkeypatch):
    """And the portion goes on behind it."""
    ends = iter([(2, "killed"), (3, "said nothing")])

    def run(job, cache, out):
        more, ended = next(ends)
        done = len(out.read_text().splitlines()) if out.exists() else 0
        with out.open("a") as lines:
            for index in range(done, done + more):
                row = {"index": index, "kind": "cut off", "model": "bert", "file": ".",
                       "verdict": target.REFUSED, "detail": ""}  # fmt: skip
                lines.write(json.dumps(row) + "\n")
        return ended

    monkeypatch.setattr(campaign, "_run", run)
    found = campaign.portion(0, 0, 6, SETTINGS, tmp_path, tmp_path, models)
    assert [row["verdict"] == target.FINDING for row in found] == [False] * 2 + [True] + [False] * 3
    assert found[2]["detail"] == "killed" and found[2]["kind"] == mutations.draw(0, 2, models).kind
    again = campaign.portion(0, 0, 6, SETTINGS, tmp_path, tmp_path, models)  # nothing is redone
    assert again == found
    summary = campaign.summary(found)
    assert summary["files"] == 6 and summary[target.FINDING] == 1
    assert summary["first_findings"] == [found[2]]
    assert sum(sum(each.values()) for each in summary["kinds"].values()) == 6


def test_files_outside_are_compared(models, tmp_path, monkeypatch):
    def examine(path, seconds, templates):
        (tmp_path / "box" / mutations.OUTSIDE / "canary.json").write_text("touched")
        return target.Verdict(target.ACCEPTED)

    monkeypatch.setattr(target, "examine", examine)
    found = worker.one(0, 0, models, tmp_path / "box", 1.0, {})
    assert found["verdict"] == target.FINDING and "files outside changed" in found["detail"]


def test_the_fields_of_a_gguf_file_are_found(models):
    content = bytearray(models["gguf-q4"].read_bytes())
    parts = gguf_edits._parts(content)
    assert (8, 8, False) in parts and (16, 8, False) in parts  # the two counts
    texts = {bytes(content[start : start + size]) for start, size, text in parts if text}
    assert b"general.architecture" in texts and b"blk.0.attn_q.weight" in texts


def test_kinds_draw_evenly(models):
    kinds = collections.Counter(mutations.draw(0, i, models).kind for i in range(3000))
    assert set(kinds) == set(mutations.KINDS)
    assert max(kinds.values()) < 2 * 3000 / len(kinds)
    assert shards.INDEX in {mutations.draw(0, i, models).file for i in range(500)}


def test_where_a_whole_model_is_a_finding_nothing_is_counted(models, tmp_path):
    (models["ct-int4"] / "config.json").rename(tmp_path / "kept")
    try:
        place = models["bert"].parents[2]
        with pytest.raises(UserError, match="Nothing can be measured here: ct-int4 as it was writ"):
            campaign.portion(0, 500, 502, SETTINGS, place, tmp_path, models)
        assert not (place / "500.jsonl").exists()
    finally:
        (tmp_path / "kept").rename(models["ct-int4"] / "config.json")
