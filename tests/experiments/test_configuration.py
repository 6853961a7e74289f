"""Typing mistakes are refused with what was meant; what a configuration resolves to is kept."""

import re
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from experiments.configuration import CONF, check, did_you_mean, leaves
from experiments.errors import UserError
from tests.experiments import tiny

GOLDEN = tiny.ROOT / "tests" / "golden" / "configs"
ENTRY_POINTS = sorted(path.stem for path in Path(CONF).glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in Path(CONF, "experiment").glob("*.yaml"))


def command(experiment):
    """What an experiment is of, as its own header says."""
    text = Path(CONF, "experiment", f"{experiment}.yaml").read_text()
    return re.search(r"# command: +python -m experiments\.(\w+) experiment=", text)[1]


JOBS = [(name, None) for name in ENTRY_POINTS] + [(command(name), name) for name in EXPERIMENTS]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("algorithm.bitz=3", "no setting algorithm.bitz; did you mean algorithm.format.bits?"),
        ("walk.chunks=3", "did you mean walk.chunk?"),
        ("algorithm=gptqq", "algorithm=gptqq is no choice of algorithm; did you mean gptq?"),
        ("data=wiki", "data=wiki is no choice of data; did you mean"),
        ("algoritm=gptq", "compress has no setting algoritm; did you mean algorithm?"),
        ("optimizer=adamw", "compress has no setting optimizer: it is one of train."),
        ("+algorithm.bitz=3", "algorithm has no setting algorithm.bitz; did you mean"),
        ("+nonsense=1", "compress has no setting nonsense"),
        ("algorithm=rtn algorithm.damping=1", "compress has no setting algorithm.damping"),
        ("structure=shortgpt structure.count=9", "choose from fraction, layers."),
        ("--multirun algorithm=rtn,gptx", "algorithm=gptx is no choice"),
        ("--multirun algorithm=rtn,gptq algorithm.damping=1", "no setting algorithm.damping"),
        ("hydra/launcher=jobli", "jobli is no choice of hydra/launcher; did you mean joblib?"),
        ("walk.chunk={", "give settings as key=value"),
        ("correction=null", "correction=none leaves it out"),
        ("algorithm.format.group_size=null correction=null", "correction=none leaves it out"),
        ("--multirun scaling=awq,null", "scaling=none leaves it out"),
    ],
)
def test_a_typing_mistake_is_refused(arguments, sentence):
    with pytest.raises(UserError) as caught:
        check("compress", arguments.split())
    assert sentence in str(caught.value), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "algorithm=rtn algorithm.format.bits=3 seed=5",
        "--multirun algorithm=rtn,gptq algorithm.format.bits=2,3",
        "model=local model.path=/somewhere data=text data.path=x",
        "--multirun seed=range(3) hydra/launcher=joblib hydra.launcher.n_jobs=2",
        "--multirun correction=none,eora",
        "--cfg job",
    ],
)
def test_what_is_right_passes(arguments):
    check("compress", arguments.split())


def test_a_users_own_folder_counts(tmp_path):
    (tmp_path / "algorithm").mkdir()
    (tmp_path / "algorithm" / "mine.yaml").write_text("_target_: mine.mine\nstrength: 1\n")
    folder = ["--config-dir", str(tmp_path)]
    check("compress", [*folder, "algorithm=mine", "algorithm.strength=2"])
    with pytest.raises(UserError, match="did you mean algorithm.strength"):
        check("compress", [*folder, "algorithm=mine", "algorithm.strenght=2"])
    with pytest.raises(UserError, match="did you mean mine"):
        check("compress", [*folder, "algorithm=mime"])


def test_a_users_experiment_with_a_typing_mistake_is_refused(tmp_path):
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ndefaults:\n  - override /algorithm: rtn\nalgorithm: {bitz: 3}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match="no setting algorithm.bitz"):
        check("compress", ["--config-dir", str(tmp_path), "experiment=mine"])


def test_near_words_are_suggested_and_short_lists_named():
    assert did_you_mean("bitz", ["bits", "group"]) == "; did you mean bits?"
    assert did_you_mean("zzz", ["bits", "group"]) == ": choose from bits, group."
    assert did_you_mean("zzz", [str(n) for n in range(40)]) == "."


@pytest.mark.parametrize("name, experiment", JOBS)
def test_a_configuration_resolves_to_what_it_did(name, experiment, request):
    """Whoever changes what a command does by default sees it here: --update-golden writes anew."""
    overrides = [] if experiment is None else [f"experiment={experiment}"]
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        found = OmegaConf.to_container(hydra.compose(name, overrides), resolve=True)
    path = GOLDEN / f"{name}{f'-{experiment}' if experiment else ''}.yaml"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(OmegaConf.to_yaml(found))
    assert found == OmegaConf.to_container(OmegaConf.load(path))


def test_every_golden_configuration_is_checked():
    known = {f"{name}{f'-{experiment}' if experiment else ''}" for name, experiment in JOBS}
    assert known == {path.stem for path in GOLDEN.glob("*.yaml")}


def test_a_dry_run_says_where_each_value_came_from(tmp_path):
    done = tiny.command(
        "experiments.compress", *tiny.overrides(tmp_path), "algorithm=rtn",
        "algorithm.format.bits=3", "algorithm.format.group_size=32", "dry_run=true",
        cwd=tmp_path, COLUMNS="200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stderr.splitlines() if line.strip()}
    assert "command line: algorithm.format.bits=3" in rows["algorithm.format.bits"]
    assert "algorithm/format/int.yaml" in rows["algorithm.format.symmetric"]
    assert "common/run.yaml" in rows["seeds.data"]
    assert "compress.yaml" in rows["walk.chunk"]
    assert not (tmp_path / "runs").exists()


def test_leaves_are_named_by_their_dotted_keys():
    assert dict(leaves({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "a.c": {}, "d": [1]}
