import csv
import io
import json
import math

import numpy as np
import pytest
from scipy import stats

from experiments import collect, comparison
from experiments.comparison import compare, experiments
from experiments.errors import UserError
from tests.experiments.papers.synthetic import GPTQ, RTN, record


def store(folder, *found):
    """Each record in a run's folder of its own; a record of benchmarks beside them."""
    for number, each in enumerate(found):
        place = folder / each["command"] / f"run-{number}" / "seed-0"
        place.mkdir(parents=True)
        (place / "record.json").write_text(json.dumps(each))
    return folder


def losses(found):
    return np.array(found["metrics"]["perplexity"]["window_losses"])


def test_one_seed_is_judged_over_windows_in_the_log():
    free, low = record("float"), record(GPTQ + "4", 0.2, noise=0.05)
    reference, row = compare(experiments([free, low]))
    mean, interval = losses(low).mean(), stats.ttest_1samp(losses(low), 0).confidence_interval(0.95)
    assert row.over == "windows" and row.found.n == 40
    assert row.found[1] == pytest.approx(mean)
    assert row.found[3:5] == pytest.approx(tuple(interval))
    test = stats.ttest_rel(losses(low), losses(free))
    assert row.p == pytest.approx(test.pvalue)  # the only comparison
    assert row.difference.mean == pytest.approx(np.mean(losses(low) - losses(free)))
    assert reference.difference is None and math.isnan(reference.p)
    assert comparison.cells(row, comparison.PERPLEXITY)[3] == f"{math.exp(mean):.2f}"


def test_seeds_are_repetitions():
    free = record("float")
    low = [record(GPTQ + "4", 0.2, noise=0.3, seed=seed) for seed in range(4)]
    high = [record(RTN + "4", 0.3, noise=0.3, seed=seed) for seed in range(4)]
    found = compare(experiments([free, *low, *high]), reference="RTN")
    row = found[1]
    means = np.array([[losses(r).mean() for r in low], [losses(r).mean() for r in high]])
    assert (row.over, row.found.n, row.difference_over) == ("seeds", 4, "seeds")
    assert row.found[3:5] == pytest.approx(
        tuple(stats.ttest_1samp(means[0], 0).confidence_interval(0.95))
    )
    test = stats.ttest_rel(means[0], means[1])
    assert row.difference.p == pytest.approx(test.pvalue)
    assert row.p >= row.difference.p  # Holm: the float model is compared with RTN too


def test_a_single_shared_seed_leaves_the_windows():
    low, high = record(GPTQ + "4", 0.2), [record(RTN + "4", 0.3, seed=seed) for seed in (0, 1)]
    row = compare(experiments([low, *high]), reference="RTN")[0]
    assert row.difference_over == "windows" and row.difference.n == 40


def test_the_same_seeds_again_tell_of_times_alone():
    first = record(RTN + "4", 0.3, seconds={"compress": 10.0})
    again = first | {"started": "2026-02-01T00:00:00+00:00", "seconds": {"compress": 12.0}}
    found = experiments([first, again])
    assert len(found) == 1 and compare(found)[0].over == "windows"
    row = compare(found, "seconds.compress")[0]
    assert (row.over, row.found.n, row.found.mean) == ("runs", 2, 11.0)


def test_what_cannot_be_paired_is_said():
    free, other = record("float"), record(RTN + "4", 0.3, windows="other")
    found = compare(experiments([free, other]), reference="RTN")
    assert [row.difference_over for row in found] == ["other windows", "–"]
    seeds = [record(RTN + "4", 0.3, seed=0), record(GPTQ + "4", 0.2, seed=3)]
    assert compare(experiments(seeds), reference="RTN")[1].difference_over == "no shared seed"
    assert compare(experiments([free, other]))[1].difference is None  # no float model of its own


def test_namesakes_are_told_apart():
    names = [GPTQ + "3", GPTQ + "3 walk.sequential=false", GPTQ + "3 data.calibration=128"]
    found = experiments([record(name, 0.5) for name in names])
    assert [each.name for each in found] == [
        "GPTQ 3 bit g64",
        "GPTQ 3 bit g64 sequential=false",
        "GPTQ 3 bit g64 calibration=128",
    ]
    assert comparison.choose(found, "GPTQ 3 bit g64") is found[0]  # exactly, though all hold it
    assert comparison.choose(found, "sequential") is found[1]
    with pytest.raises(UserError, match="reference '=' names 2 experiments: give one of GPTQ 3"):
        comparison.choose(found, "=")
    with pytest.raises(UserError, match="names no experiment"):
        comparison.choose(found, "AWQ")


def test_runs_are_gathered_once_and_benchmarks_left_out(tmp_path):
    low, free = record(GPTQ + "4", 0.2), record("float")
    store(tmp_path / "runs", low, free, low | {"command": "benchmark"})
    published = tmp_path / "results"
    published.mkdir()
    (published / "gptq.json").write_text(json.dumps(low))
    found = collect.gather([tmp_path / "runs", published, published / "gptq.json"])
    assert sorted(each["command"] for each in found) == ["compress", "evaluate"]
    with pytest.raises(UserError, match="There is no .*nowhere: name a folder"):
        collect.gather([tmp_path / "nowhere"])


def test_what_did_not_finish_is_listed(tmp_path):
    store(tmp_path, record("float"))
    (tmp_path / "evaluate" / "run-0" / "seed-0" / "journal.jsonl").write_text('{"event": "x"}\n')
    for name, last in {
        "failed": '{"event": "failed", "error": "site mlp.input is singular"}\n',
        "killed": '{"event": "layer", "layer": 3}\n{"event": "lay',
        "empty": "",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.jsonl").write_text('{"event": "started"}\n' + last)
    found = {folder.name: reason for folder, reason in collect.unfinished([tmp_path])}
    assert found == {
        "failed": "failed: site mlp.input is singular",
        "killed": "interrupted, or running still: its command goes on with it",
        "empty": "interrupted, or running still: its command goes on with it",
    }


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["collect", *map(str, arguments)])
    collect.main()


def test_the_command_writes_whole_tables(tmp_path, monkeypatch, capsys):
    runs = store(
        tmp_path / "runs", record("float"), record(GPTQ + "4", 0.2), record(RTN + "4", 0.3)
    )
    (runs / "broken").mkdir()
    (runs / "broken" / "journal.jsonl").write_text('{"event": "failed", "error": "no disk"}\n')
    out = tmp_path / "out"
    out.mkdir()
    command(monkeypatch, runs, "--csv", out / "t.csv", "--markdown", out / "t.md")
    assert sorted(path.name for path in out.iterdir()) == ["t.csv", "t.md"]
    rows = list(csv.DictReader(io.StringIO((out / "t.csv").read_text())))
    assert [row["method"] for row in rows] == ["GPTQ 4 bit g64", "RTN 4 bit g64", "float"]
    assert float(rows[0]["low"]) < float(rows[0]["mean"]) < float(rows[0]["high"])
    assert float(rows[0]["p_holm"]) < 1e-3 and rows[2]["difference"] == ""
    assert "| GPTQ 4 bit g64 | 4.38 | 1 |" in (out / "t.md").read_text()
    shown = capsys.readouterr().err
    assert "not in the table" in shown and "failed: no disk" in shown


def test_a_sweeps_records_are_published(tmp_path, monkeypatch, capsys):
    of_made = record(
        "model=made model.overrides=['algorithm=rtn'] model.runs=/here algorithm=gptq", 0.3
    )
    of_made["config"]["measured"] = {"runs": [["algorithm=rtn"]]}  # no folder
    runs = store(tmp_path / "runs", record("float"), record(GPTQ + "4", 0.2), of_made)
    command(monkeypatch, runs, "--publish", tmp_path / "results")
    kept = collect.gather([tmp_path / "results"])
    assert {each["identity"] for each in kept} == {r["identity"] for r in collect.gather([runs])}
    assert "published 3 records" in capsys.readouterr().err
    (made,) = [each for each in kept if each["identity"] == of_made["identity"]]
    assert made["config"]["model"]["runs"] == made["config"]["runs"] == "runs"
    assert made["config"]["model"]["overrides"] == ["algorithm=rtn"]
    assert made["config"]["measured"] == of_made["config"]["measured"]


def test_what_lacks_the_metric_is_listed(tmp_path, monkeypatch, capsys):
    store(tmp_path, record("float"), record(RTN + "4", 0.3))
    command(monkeypatch, tmp_path, "--metric", "seconds.compress")
    shown = capsys.readouterr().err
    assert "not in the table: float: no seconds.compress" in shown and "16.38" in shown


def test_no_runs_is_no_error(tmp_path, monkeypatch, capsys):
    command(monkeypatch, tmp_path)
    assert "no finished runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nowhere"], "There is no nowhere"),
        (["runs", "--metric", "metrics.accuracy"], "has no number at metrics.accuracy"),
        (["runs", "--reference", "AWQ"], "names no experiment"),
        (["runs", "--csv", "nowhere/t.csv"], "nowhere to write t.csv into: make it"),
        (["runs", "--markdown", "/dev/null"], "/dev/null is not a file that a table could replace"),
        (["runs", "--csv", "runs"], "runs is not a file that a table could replace"),
        (["broken.json"], "cannot be read as a record"),
        (["old.json"], "is not a record of schema"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    store(tmp_path / "runs", record("float"))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "old.json").write_text('{"schema": 0}')
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    assert stop.value.code == 1
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("elsewhere, mark", [(0.04, ""), (0.06, " †"), (None, " †")])
def test_a_time_on_a_busy_machine_is_marked(elsewhere, mark):
    noted = {} if elsewhere is None else {"elsewhere": {"compress": elsewhere}}
    found = record(RTN + "4", 0.3, seconds={"compress": 10.0}, **noted)
    row = comparison.markdown(compare(experiments([found]))).splitlines()[2]
    assert f"| 10{mark} |" in row


def test_growth_compares_late_blocks_with_early_ones():
    layers = [{"seconds": {"solve": spent}} for spent in (9.0, 1.0, 1.0, 5.0, 2.5, 2.0, 3.0)]
    found = record(RTN + "4", 0.3, seconds={"compress": 10.0}, layers=layers)
    row = comparison.markdown(compare(experiments([found]))).splitlines()[2]
    assert "| 10 † | 2.50 |" in row
    short = comparison.markdown(compare(experiments([record(RTN + "4", 0.3)]))).splitlines()[2]
    assert " † | – |" in short
