"""The rules of the house that no linter knows."""

import dataclasses
import inspect
import re
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

import kernels
from algorithms.formats import Format, integer
from algorithms.quantization.aqlm import AQLMConfig
from algorithms.quantization.gptq import GPTQConfig
from algorithms.quantization.qtip import QTIPConfig
from algorithms.quantization.quip_sharp import QuIPSharpConfig
from experiments import survey
from experiments.entry import CONF
from experiments.hardware import Hardware
from experiments.streaming import Walk

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = sorted(path.stem for path in Path(CONF).glob("*.yaml"))
STEPS = ["structure", "algorithm", "algorithm/format", "rotation", "scaling", "activations",
         "correction", "export"]  # fmt: skip
CHOICES = [
    (group, path.stem)
    for group in STEPS
    for path in sorted(Path(CONF, group).glob("*.yaml"))
    if path.stem != "none"
]
CONFIGS = {  # of functions that take their fields
    "gptq": GPTQConfig, "aqlm": AQLMConfig, "qtip": QTIPConfig, "quip_sharp": QuIPSharpConfig,
}  # fmt: skip
OWN = {"element", "format", "dynamic"}  # what choices of one function differ in


def compose(name, overrides=()):
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(name, list(overrides))


def test_kernels_is_not_taken_for_the_published_package_of_that_name():
    assert Path(kernels.__file__).read_text() == ""
    assert not hasattr(kernels, "__version__")


def test_every_entry_point_has_its_configuration():
    known = {"compress", "evaluate", "export", "generate", "benchmark", "library", "reproduce",
             "search", "train"}  # fmt: skip
    assert known == set(ENTRY_POINTS)
    for name in ENTRY_POINTS:
        assert (ROOT / "experiments" / f"{name}.py").is_file()
        assert compose(name)


@pytest.mark.parametrize("group", ["model", "data", "algorithm", "evaluation"])
def test_every_choice_names_a_target_that_takes_its_keys(group):
    for path in (p for p in Path(CONF, group).glob("*.yaml") if p.stem != "none"):
        node = compose("compress", [f"{group}={path.stem}"])[group]
        target = hydra.utils.get_object(node._target_)
        keys = {key for key in node if not key.startswith("_")}
        bound = inspect.signature(target).bind_partial(**dict.fromkeys(keys))  # or TypeError
        assert bound.kwargs.keys() | bound.arguments.keys() >= keys


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_step_of_a_recipe_is_configured_with_its_own_defaults(group, name):
    """The YAML says what the code does when nothing is said, so the two cannot drift apart."""
    config = compose("compress", [f"{group}={name}"])
    node = OmegaConf.select(config, group.replace("/", "."))
    target = hydra.utils.get_object(node._target_)
    assert hydra.utils.instantiate(node) is not None
    if group == "algorithm" and name in CONFIGS:
        defaults = {f.name: f.default for f in dataclasses.fields(CONFIGS[name])}
    else:
        parameters = inspect.signature(target).parameters
        defaults = {key: parameter.default for key, parameter in parameters.items()}
    assert {key for key in node if key != "_target_"} == defaults.keys()
    for key, default in defaults.items():
        if key == "format" and node.get("format") is not None:
            assert isinstance(hydra.utils.instantiate(node.format), Format)
        elif key in OWN or OmegaConf.is_interpolation(node, key):  # ${bits}, ${seeds.init}
            continue
        elif default is not inspect.Parameter.empty:
            assert node[key] == default, key


def test_integers_are_what_an_algorithm_rounds_to_when_nothing_is_said():
    assert hydra.utils.instantiate(compose("compress").algorithm.format) == integer()


def test_settings_without_a_target_are_their_dataclasses_defaults():
    config = compose("compress")
    for node, defaults in ((config.walk, Walk()), (config.hardware, Hardware())):
        assert OmegaConf.to_container(node) == dataclasses.asdict(defaults)


def test_evaluation_is_configured_with_its_own_defaults():
    node = compose("compress").evaluation
    parameters = inspect.signature(hydra.utils.get_object(node._target_)).parameters
    for key, value in node.items():
        assert key.startswith("_") or parameters[key].default == value, key


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(CONF, "data").glob("*.yaml")))
def test_data_are_configured_with_their_own_defaults(name):
    """Where a corpus has a default, its YAML says the same, unless the protocol is another."""
    node = compose("compress", [f"data={name}"]).data
    fields = dataclasses.fields(hydra.utils.get_object(node._target_))
    own = {field.name: field.default for field in fields}
    assert {key for key in node if key != "_target_"} <= set(own)
    if "context" not in node:  # classes, no text
        for key in ("train", "heldout"):
            assert node[key] == own[key], key
    elif name not in ("wikitext2", "enwiki_train"):
        for key in ("context", "calibration", "heldout", "draw"):
            assert node[key] == own[key], key


def test_no_document_is_stale():
    """Tables, pictures, facts and bibliography; tests/experiments/test_survey.py shows it works."""
    assert list(survey.Survey().problems()) == []


def test_no_record_names_a_place_of_the_machine_that_made_it():
    kept = [*(ROOT / "papers" / "results").rglob("*.json"), *(ROOT / "kernels").rglob("*.json")]
    assert len(kept) > 100
    assert [path.name for path in kept if re.search(r': "(/|[A-Z]:\\\\)', path.read_text())] == []


def test_the_map_of_the_house_names_every_room():
    readme = (ROOT / "README.md").read_text()
    rooms = ["kernels/", "models/", "algorithms/", "experiments/", "conf/", "papers/", "tests/"]
    assert all(f"`{room}`" in readme for room in rooms)
