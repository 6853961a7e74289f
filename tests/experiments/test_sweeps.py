"""A multirun survives its jobs, and every launcher gives the same outputs."""

import importlib.util

import pytest

from tests.experiments import tiny

SWEEP = ["algorithm=rtn", "algorithm.format.bits=3,9", "algorithm.format.group_size=32", "seed=0,1"]


def multirun(tmp_path, *more, runs="runs"):
    arguments = ["--multirun", *tiny.overrides(tmp_path), *SWEEP, f"runs={tmp_path / runs}", *more]
    return tiny.command("experiments.compress", *arguments, cwd=tmp_path, COLUMNS="160")


def outputs(folder):
    """The checkpoints and records of a runs folder; times and places left out."""
    return {
        name: content
        for name, content in tiny.files(folder / "compress").items()
        if "/checkpoint/" in name
    }


def test_a_failing_job_stops_no_other_and_is_reported(tmp_path):
    done = multirun(tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(list(tmp_path.glob("runs/compress/*/seed-*/record.json"))) == 2
    rows = [line for line in done.stderr.splitlines() if line[:1].isdigit()]
    assert "2 of 4 jobs finished" in rows[-1]
    assert ["finished" in row for row in rows[:4]] == [True, True, False, False]
    assert "bits=9 must be from 2 to 8" in rows[2] and "algorithm.format.bits=9 seed=0" in rows[2]
    assert "algorithm=rtn" not in rows[2]  # shared by all jobs

    again = multirun(tmp_path)
    assert again.returncode == 1
    assert again.stderr.count("already run:") == 2  # the finished ones are not repeated


def test_a_sweep_completes_when_it_is_run_again(tmp_path):
    """What failed was the machine's: the text was not there yet."""
    arguments = tiny.overrides(tmp_path)
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").unlink()
    command = ["experiments.compress", "--multirun", *arguments, "algorithm=rtn,gptq",
               "algorithm.format.group_size=32"]  # fmt: skip
    failed = tiny.command(*command, cwd=tmp_path)
    assert failed.returncode == 1 and "0 of 2 jobs finished" in failed.stderr
    (tmp_path / "text.txt").write_text(text)
    done = tiny.command(*command, cwd=tmp_path)
    assert done.returncode == 0 and "2 of 2 jobs finished" in done.stderr


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
@pytest.mark.some(1)
def test_every_launcher_gives_the_same_outputs(tmp_path, launcher):
    if launcher == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -e '.[ray]'")
    # a Slurm cluster takes hydra/launcher=submitit_slurm; without one its local twin runs jobs
    settings = [f"hydra/launcher={launcher}"]
    settings += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done = multirun(tmp_path, *settings, runs="launched")
    assert done.returncode == 1 and "2 of 4 jobs finished" in done.stderr, done.stderr
    multirun(tmp_path)
    assert outputs(tmp_path / "launched") == outputs(tmp_path / "runs") != {}
