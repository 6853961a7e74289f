"""Reproduction with a runner that makes up records; none of a model."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from experiments import publication, reproduce
from experiments.entry import CONF, resolved
from experiments.errors import UserError
from experiments.papers import pages
from experiments.papers.facts import Check, Claim
from experiments.papers.lookup import Run
from experiments.records import ROOT
from experiments.runs.identity import identity
from experiments.runs.run import Run as Done
from tests.experiments.papers import synthetic


class Runner:
    """Gives the made-up record of a configuration back, and counts; `fails` maps identities."""

    def __init__(self, **change):
        self.known = {r["identity"]: r | change for r in synthetic.everything().values()}
        self.fails, self.calls = {}, []

    def run(self, command):
        def run(config):
            found = identity(command, resolved(config))
            self.calls.append(found)
            if found in self.fails:
                raise self.fails[found]
            if found not in self.known:
                raise UserError("no such model: give model.path=FOLDER.")
            folder = Path("runs", command, f"gptq-{found[:12]}", "seed-0")
            return Done(folder, self.known[found])

        return run

    @property
    def both(self):
        return {command: self.run(command) for command in ("compress", "evaluate")}


def config(*overrides):
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("reproduce", list(overrides))


def run(tmp_path, runner, *overrides):
    return reproduce.run(config(*overrides), runner.both, tmp_path / "results")


def identity_of(name):
    return synthetic.record(name)["identity"]


def test_every_claim_is_judged_and_every_run_made_once(tmp_path, capsys):
    runner = Runner()
    verdicts = {v.claim.id: v for v in run(tmp_path, runner, "paper=gptq")}
    assert verdicts["gptq-below-rtn-3-bits"].status == "HOLDS"
    assert verdicts["gptq-3-bits-nearly-free"].status == "DOES NOT HOLD"
    assert verdicts["gptq-true-sequential-helps"].status == "INCONCLUSIVE"
    assert len(runner.calls) == len(set(runner.calls)) == 9
    shown = " ".join(capsys.readouterr().err.split())
    assert "as expected" in shown and "INCONCLUSIVE" in shown
    assert not (tmp_path / "results").exists()  # nothing is published unless asked


def test_a_failing_run_leaves_its_claims_alone(tmp_path, capsys):
    runner = Runner()
    runner.fails[identity_of("algorithm=rtn")] = UserError("The disk is full: make room.")
    verdicts = {v.claim.id: v for v in run(tmp_path, runner, "paper=gptq")}
    assert str(verdicts["gptq-below-rtn-4-bits"]) == "NOT RUN (needs: The disk is full: make room)"
    assert verdicts["gptq-below-rtn-3-bits"].status == "HOLDS"


def test_a_crash_is_shown_and_fails_the_command(tmp_path, capsys):
    runner = Runner()
    runner.fails[identity_of("algorithm=rtn")] = ZeroDivisionError("a bug")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, runner, "paper=gptq")
    assert stop.value.code == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "ZeroDivisionError: a bug" in shown and "HOLDS" in shown


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["paper=gptg"], "no page papers/gptg.md; did you mean gptq"),
        (["paper=gptq", "scale=papers"], "has no scale 'papers'; did you mean paper"),
        ([], "paper"),
    ],
)
def test_what_is_unknown_is_refused(tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tmp_path, Runner(), *overrides)


def test_overrides_reach_every_run(tmp_path, capsys):
    runner = Runner()
    verdicts = run(tmp_path, runner, "paper=rtn", 'overrides=["data.heldout=3"]')
    assert all(verdict.status == "NOT RUN" for verdict in verdicts)
    assert not set(runner.calls) & set(runner.known)
    assert "no such model: give model.path=FOLDER" in str(verdicts[0])


def test_published_numbers_are_compared_at_their_scale(tmp_path, monkeypatch, capsys):
    mine = reproduce.Reproduction("gptq", "embedded", [], Runner().both)
    assert list(mine.published()) == []
    mine.beginning = ("experiment=gptq_llama7b",)  # as if the embedded model were the paper's
    rows = list(mine.published())
    assert [row[0].split(", ")[-1] for row in rows] == [
        "float", "4 bit per channel", "3 bit per channel", "3 bit g128"]  # fmt: skip
    ours = synthetic.record("float")["metrics"]["perplexity"]["value"]
    assert rows[0] == [rows[0][0], "5.68", f"{ours:.2f}", f"{ours - 5.68:+.2f}"]
    assert rows[3][2].startswith("NOT RUN (needs: no such model")


def test_published_records_are_compared_with_the_next_time(tmp_path, capsys):
    runner = Runner()
    run(tmp_path, runner, "paper=gptq", "publish=true")
    files = sorted((tmp_path / "results").iterdir())
    assert len(files) == 9
    for path in files:
        found = json.loads(path.read_text())
        assert path.name == f"gptq-{found['identity'][:8]}.json"
        assert found == runner.known[found["identity"]]
    capsys.readouterr()
    run(tmp_path, runner, "paper=gptq", "publish=true")  # the same runs again: replaced
    shown = " ".join(capsys.readouterr().err.split())
    assert "reproduced" in shown and "+0" in shown
    assert sorted((tmp_path / "results").iterdir()) == files


def test_a_training_run_is_repeated_with_the_seeds_of_its_page(monkeypatch):
    """And a claim is judged by all of them."""
    made = []

    def train(config):
        made.append((config.optimizer._target_, config.seed))
        loss = config.seed / 10 + ("adamw" in config.optimizer._target_)
        run = Run("train", ("experiment=c1", f"seed={config.seed}"))
        return Done(Path("x"), synthetic.of(run, seed=config.seed, training={"loss": loss}))

    check = Check(metric="training.loss", lower=("optimizer=muon",), higher=("optimizer=adamw",))
    page = dataclasses.replace(
        pages.read_pages()["gptq"], config="conf/optimizer/muon.yaml", seeds=(3, 4, 5),
        scales={"embedded": ("experiment=c1",)},
        claims=(Claim(id="c", sentence="s", source="k", check=check, experiment="x"),),
    )  # fmt: skip
    monkeypatch.setattr(pages, "read_pages", lambda: {"muon": page})
    (verdict,) = reproduce.Reproduction("muon", "embedded", [], {"train": train}).verdicts()
    assert verdict.status == "HOLDS" and "n = 3 seeds" in verdict.evidence
    assert [seed for _, seed in made] == [3, 4, 5] * 2


def test_what_no_commit_holds_is_not_published(tmp_path, capsys):
    runner = Runner(code={"commit": "c" * 40, "clean": False})
    with pytest.raises(UserError, match="recorded with changes that no commit holds"):
        run(tmp_path, runner, "paper=gptq", "publish=true")
    assert not (tmp_path / "results").exists()


def test_another_runs_file_is_never_replaced(tmp_path):
    record = synthetic.record("algorithm=rtn", 0.2)
    done = Done(Path("runs", "compress", f"rtn-{record['identity'][:12]}", "seed-0"), record)
    (path,) = publication.publish([done], tmp_path)
    other = record | {"identity": record["identity"][:8] + "0" * 56}
    with pytest.raises(UserError, match="is of another run"):
        publication.publish(
            [Done(Path("compress", f"rtn-{other['identity'][:12]}", "0"), other)], tmp_path
        )
    assert json.loads(path.read_text()) == record
    seeded = synthetic.record("algorithm=rtn", 0.2, seed=1)
    (beside,) = publication.publish([Done(done.folder, seeded)], tmp_path)
    assert beside.name == path.name.replace(".json", "-seed-1.json")


def test_the_command_names_what_the_papers_own_scale_needs(tmp_path):
    """Through Hydra, within which every run's configuration is composed."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.reproduce", "paper=gptq", "scale=paper"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "NOT RUN" in done.stderr and "model.path=…" in done.stderr
    assert "LLaMA-7B" in done.stderr and "6.09" in done.stderr
    assert not list(tmp_path.iterdir())


def test_where_a_run_lay_is_not_published(tmp_path):
    record = synthetic.record("algorithm=rtn", 0.2)
    record["config"]["runs"] = "/somewhere/on/this/machine"
    done = Done(Path("runs", "compress", f"rtn-{record['identity'][:12]}", "seed-0"), record)
    (path,) = publication.publish([done], tmp_path)
    assert json.loads(path.read_text()) == {
        **record,
        "config": {**record["config"], "runs": "runs"},
    }
    assert record["config"]["runs"] == "/somewhere/on/this/machine"
