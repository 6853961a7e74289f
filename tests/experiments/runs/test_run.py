import json

import pytest

from experiments import compress, records
from experiments.errors import UserError
from experiments.runs import run as runs
from experiments.runs.journal import Journal

SETTINGS = ["algorithm=rtn", "algorithm.format.group_size=32"]


@pytest.fixture
def at(config):
    return runs.place("compress", compress.resolved(config(*SETTINGS)))


def test_the_same_command_again_gives_the_finished_run(config, capfd):
    first = compress.run(config(*SETTINGS))
    written = (first.folder / "record.json").stat().st_mtime_ns
    again = compress.run(config(*SETTINGS, "seeds.init=0"))
    assert again == first
    assert (first.folder / "record.json").stat().st_mtime_ns == written
    assert "already run" in capfd.readouterr().err


def test_again_runs_beside_the_finished_run(config):
    first = compress.run(config(*SETTINGS))
    second = compress.run(config(*SETTINGS, "again=true"))
    third = compress.run(config(*SETTINGS, "again=true"))
    names = [done.folder.name for done in (first, second, third)]
    assert names == ["seed-0", "seed-0.2", "seed-0.3"]
    assert first.record["metrics"] == third.record["metrics"]
    assert compress.run(config(*SETTINGS)) == first


def test_seeds_are_repetitions_of_one_experiment(config):
    done = [compress.run(config(*SETTINGS, f"seed={seed}")) for seed in (0, 1)]
    assert done[0].folder.parent == done[1].folder.parent
    assert done[0].record["identity"] == done[1].record["identity"]
    assert [run.record["seeds"]["data"] for run in done] == [0, 1]


def test_a_changed_commit_is_recorded_and_warned_about(config, at, monkeypatch, capfd):
    other = {"commit": "0123456789abcdef", "clean": True}
    with monkeypatch.context() as patched:
        patched.setattr(records, "code_version", lambda: other)
        with pytest.raises(UserError, match="stop here"), runs.begin(at):
            raise UserError("stop here")
    done = compress.run(config(*SETTINGS))
    assert "this run was begun at commit 0123456789, and the code" in capfd.readouterr().err
    assert [attempt["code"]["commit"] for attempt in done.record["attempts"]] == [
        other["commit"],
        records.code_version()["commit"],
    ]
    assert "this run was begun at commit 0123456789" in done.record["warnings"][0]
    with monkeypatch.context() as patched:
        patched.setattr(records, "code_version", lambda: other)
        compress.run(config(*SETTINGS))
    assert "it was recorded at" in capfd.readouterr().err


@pytest.mark.parametrize(
    "error, event, said",
    [
        (UserError("one sentence"), "failed", "one sentence"),
        (KeyboardInterrupt(), "interrupted", None),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_how_a_run_ended_is_in_its_journal(at, error, event, said):
    with pytest.raises(type(error)), runs.begin(at):
        raise error
    last = Journal(at.folder).entries()[-1]
    assert last["event"] == event and last.get("error") == said
    assert not at.finished


def test_a_run_whose_claim_was_lost_writes_no_record(at, monkeypatch):
    def lost(self):
        raise UserError("another process took over")

    with pytest.raises(UserError, match="took over"), runs.begin(at) as run:
        monkeypatch.setattr(runs.Claim, "check", lost)
        run.finish()
    assert not at.finished


def test_a_record_has_all_that_a_reader_needs(config):
    record = compress.run(config(*SETTINGS)).record
    assert record["schema"] == records.SCHEMA
    assert {
        "schema", "command", "identity", "seeds", "config", "started", "code", "versions", "device",
        "model", "data", "metrics", "footprint", "bytes_on_disk", "layers", "status", "seconds",
        "elsewhere", "peak_memory", "memory_at_start", "kernels", "attempts", "warnings",
        "estimate",
    } == set(record)  # fmt: skip
    assert json.loads(json.dumps(record)) == record
    metrics = record["metrics"]["perplexity"]
    assert {"value", "standard_error", "window_losses", "windows", "data"} <= set(metrics)


def test_a_record_of_another_schema_is_refused(tmp_path):
    (tmp_path / "record.json").write_text('{"schema": 1}')
    with pytest.raises(UserError, match=f"is not a record of schema {records.SCHEMA}"):
        records.read(tmp_path / "record.json")
