"""conf/experiment/: each says what it reproduces, composes, instantiates, and runs when it can."""

import shlex
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf

from algorithms.layerwise import LayerwiseMethod
from experiments import compress, configuration
from experiments.configuration import CONF
from experiments.data.corpora import Corpus
from experiments.papers import pages
from experiments.streaming import Walk
from experiments.training.building import build_optimizer
from tests.experiments import tiny

EXPERIMENTS = sorted(path.stem for path in Path(CONF, "experiment").glob("*.yaml"))
HEADER = ["paper", "command", "hardware", "time", "expected"]
FILES = ["data.calibration_path=c4.txt", "data.heldout_path=wikitext2-test.txt"]


def header(name):
    """The opening comment's fields; a line that begins with spaces goes on with the one before."""
    package, *lines = Path(CONF, "experiment", f"{name}.yaml").read_text().splitlines()
    assert package == "# @package _global_"
    found: dict[str, str] = {}
    end = next(n for n, line in enumerate(lines) if line in ("#", "defaults:"))
    for line in lines[:end]:
        key, _, rest = line.removeprefix("# ").partition(":")
        if key in HEADER:
            found[key] = rest.strip()
        else:
            assert line.startswith("#    "), f"{name}: {line}"
            found[list(found)[-1]] += " " + line.removeprefix("#").strip()
    return found


def compose(*overrides, name="compress"):
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(name, list(overrides))


def entry(name):
    """What the header's command runs: compress or train."""
    words = shlex.split(header(name)["command"])
    assert words[:2] == ["python", "-m"]
    return words[2].removeprefix("experiments.")


def command(name):
    """The overrides of the header's command."""
    return shlex.split(header(name)["command"])[3:]


def of(entry_point):
    return [name for name in EXPERIMENTS if entry(name) == entry_point]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_opens_with_what_it_reproduces(name):
    found = header(name)
    assert list(found) == HEADER
    assert all(found.values())
    assert command(name)[0] == f"experiment={name}"


@pytest.mark.parametrize("name", of("train"))
def test_every_training_experiment_composes_and_builds(name):
    overrides = command(name)
    configuration.check("train", overrides)
    config = compose(*overrides, name="train")
    assert not OmegaConf.missing_keys(config)
    build_optimizer(config)
    for group in ("data", "loss"):
        hydra.utils.instantiate(config[group])


@pytest.mark.parametrize("name", of("compress"))
def test_every_experiment_composes_and_instantiates(name):
    overrides = command(name)
    configuration.check("compress", overrides)  # no key that the groups do not have
    config = compose(*overrides)
    assert not OmegaConf.missing_keys(config)
    if config.algorithm or not config.structure:  # a structure may be all that is done
        assert isinstance(hydra.utils.instantiate(config.algorithm), LayerwiseMethod)
    corpus = hydra.utils.instantiate(config.data)
    assert isinstance(corpus, Corpus)
    corpus.validate()
    Walk(**config.walk)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_missing_is_asked_for_by_name(name):
    """Without the paths of the command, nothing but the paths is missing."""
    missing = OmegaConf.missing_keys(compose(f"experiment={name}", name=entry(name)))
    assert missing == {word.split("=")[0] for word in command(name)[1:]}


def test_every_published_number_stands_in_the_header_of_its_experiment():
    for stem, page in pages.read_pages().items():
        for table in page.published:
            if table.experiment is None:
                continue
            expected = header(table.experiment)["expected"]
            for value in (table.dense, *(row.value for row in table.rows)):
                assert f"{value:.2f}" in expected, f"papers/{stem}.md, {table.experiment}: {value}"


def test_every_experiment_that_a_page_names_exists():
    found = pages.read_pages()
    named = {table.experiment for page in found.values() for table in page.published}
    for page in found.values():
        scales = [word for words in page.scales.values() for word in words]
        named |= {word.split("=")[1] for word in scales if word.startswith("experiment=")}
    assert named - {None} <= set(EXPERIMENTS)


def test_the_papers_protocol_is_the_official_one():
    config = compose("experiment=gptq_llama7b", "model.path=x", *FILES)
    assert (config.data.context, config.data.calibration, config.data.heldout) == (2048, 128, None)
    assert config.walk.sequential and config.data.bos
    algorithm = dict(config.algorithm)
    assert algorithm == algorithm | dict(activation_order=True, damping=0.01)
    grid = dict(config.algorithm.format)
    assert grid == grid | dict(
        bits=4, group_size=None, symmetric=False, search=None, scale_dtype=None
    )


def test_a_papers_algorithms_share_one_float_model():
    """What the float model is evaluated on is the same for all, so that one run serves them."""
    for model in ("smollm2", "llama7b", "llama32_1b"):
        paths = [] if model == "smollm2" else ["model.path=x", *FILES]
        found = [compose(f"experiment={name}_{model}", *paths) for name in ("gptq", "rtn")]
        for key in ("model", "data", "evaluation"):
            assert found[0][key] == found[1][key]


@pytest.fixture
def small(tmp_path):
    """Overrides that put the tiny model and texts in place of the paper's."""
    text = tiny.write_text(tmp_path)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text(text.read_text()[:1000])
    return [
        f"model.path={tiny.write_model(tmp_path)}",
        f"data.calibration_path={text}",
        f"data.heldout_path={heldout}",
        "data.context=16",
        "data.calibration=6",
        f"runs={tmp_path / 'runs'}",
        "logger.tensorboard=false",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=gptq_llama7b"],
        ["experiment=gptq_llama7b", "algorithm.format.bits=3", "algorithm.format.group_size=32"],
        ["experiment=rtn_llama7b"],
        ["experiment=rtn_llama32_1b", "algorithm.format.group_size=32"],
    ],
    ids=lambda overrides: " ".join(overrides).removeprefix("experiment="),
)
@pytest.mark.some(2)
def test_an_experiment_runs_from_end_to_end(small, overrides):
    record = compress.run(compose(*overrides, *small)).record
    assert record["status"] == "finished"
    found = record["metrics"]["perplexity"]
    windows, context = found["windows"]
    assert context == 16 and windows > 40  # all that the text has
    assert np.isfinite(found["value"])
    assert all(0 < e < 0.1 for layer in record["layers"] for e in layer["errors"].values())
