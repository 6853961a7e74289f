"""Configurations without typing mistakes: unknown keys and choices are refused before any work,
with what was probably meant; and where each value of a configuration came from.
"""

import argparse
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.errors import UserError

CONF = str(Path(__file__).parents[1] / "conf")
COMBINATIONS = 256  # of a multirun that are composed before it starts
EXPERIMENT = "experiment"  # its files set keys of other groups


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean a?", or what there is where nothing is near and that is not too much."""
    choices = sorted(set(known))
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f": choose from {', '.join(choices)}." if 0 < len(choices) <= 12 else "."


def check(name: str, arguments: Sequence[str]) -> None:
    """Compose every job that a command line asks for; raise UserError at the first mistake."""
    parsed = _parser().parse_known_args(arguments)[0]
    overrides = [a for a in parsed.overrides if "=" in a or a.startswith("~")]  # no flag's value
    folders = [f"file://{Path(parsed.config_dir).absolute()}"] if parsed.config_dir else []
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        for job in itertools.islice(_jobs(overrides), COMBINATIONS):
            _check_job(name, job, folders)


def _parser() -> argparse.ArgumentParser:
    """The two of Hydra's own flags that bear on which keys and choices there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    return parser


def _jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Each combination of what the overrides sweep over."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(
            f"{_first_line(error)}: give settings as key=value, quoted where the shell needs it, "
            "and those within a list once more: 'model.overrides=[\"algorithm=rtn\"]'."
        ) from error
    yield from (list(job) for job in itertools.product(*map(_values, parsed)))


def _values(override: Override) -> list[str]:
    assert override.input_line is not None
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.input_line.split("=", 1)[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _check_job(name: str, job: list[str], folders: list[str]) -> None:
    path = [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
    try:
        config = hydra.compose(name, [*path, *job], return_hydra_config=True)
    except MissingConfigException as error:
        raise _unknown_choice(error) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise _unknown_key(name, error, [*path, *job]) from error
    except ValueError as error:  # Hydra's own, for what is no name of a file
        nulls = [o.removesuffix("=null") for o in job if o.endswith("=null")]
        group = next((key for key in nulls if "." not in key), None)
        if group is None:
            raise
        raise UserError(
            f"{group} takes one of its choices by name: {group}=none leaves it out."
        ) from error
    choices = {k: v for k, v in config.hydra.runtime.choices.items() if not k.startswith("hydra/")}
    groups = [f"{group}={choice}" for group, choice in choices.items() if group != EXPERIMENT]
    known = hydra.compose(name, [*path, *(g for g in groups if not g.endswith("=None"))])
    with_hydra = OmegaConf.to_container(config, resolve=False)
    assert isinstance(with_hydra, dict)
    del with_hydra["hydra"]
    if unknown := next(_unknown(with_hydra, OmegaConf.to_container(known, resolve=False)), None):
        key, siblings = unknown
        where = key.rpartition(".")[0] or name
        raise UserError(f"{where} has no setting {key}{did_you_mean(key, siblings)}")


def _unknown(found: Any, known: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Dotted keys of `found` that `known` lacks, each with those that it could have been."""
    if not isinstance(found, Mapping) or not isinstance(known, Mapping):
        return
    for key, value in found.items():
        if key not in known:
            yield f"{prefix}{key}", [f"{prefix}{sibling}" for sibling in known]
        else:
            yield from _unknown(value, known[key], f"{prefix}{key}.")


def _unknown_choice(error: MissingConfigException) -> UserError:
    missing, options = error.missing_cfg_file or "", error.options or []
    group, _, choice = missing.rpartition("/")
    return UserError(f"{group}={choice} is no choice of {group}{did_you_mean(choice, options)}")


def _unknown_key(name: str, error: Exception, job: Sequence[str]) -> UserError:
    """For a key that the configuration lacks; any other complaint in the library's words."""
    sentence = _first_line(error)
    match = re.search(r"Could not override '([^']+)'", str(error))
    if not match:
        return UserError(f"{sentence} (in {name} {' '.join(job)}).")
    key = match[1].split("@")[0]
    if others := _commands(key):
        return UserError(f"{name} has no setting {key}: it is one of {' and '.join(others)}.")
    groups = [o for o in job if "." not in o.split("=")[0] or o.startswith("hydra.searchpath")]
    try:
        known = hydra.compose(name, [g for g in groups if g.split("=")[0].lstrip("+~") != key])
    except HydraException:
        known = hydra.compose(name)
    keys = list(_dotted(OmegaConf.to_container(known, resolve=False)))
    loader = GlobalHydra.instance().config_loader()
    keys += [str(group) for group in loader.list_groups("") if group != "hydra"]
    if "." in key:
        if deeper := _deeper(key, keys):
            return UserError(f"{name} has no setting {key}; did you mean {deeper[0]}?")
        parent, _, last = key.rpartition(".")
        if siblings := [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]:
            return UserError(f"{name} has no setting {key}{did_you_mean(last, siblings)}")
    return UserError(f"{name} has no setting {key}{did_you_mean(key, keys)}")


def _commands(group: str) -> list[str]:
    """Those whose defaults have the group."""
    found = []
    for path in sorted(Path(CONF).glob("*.yaml")):
        defaults = yaml.safe_load(path.read_text()).get("defaults", [])
        names = [str(key) for entry in defaults if isinstance(entry, dict) for key in entry]
        if any(key.removeprefix("override ").lstrip("/").split("@")[0] == group for key in names):
            found.append(path.stem)
    return found


def _deeper(key: str, keys: Iterable[str]) -> list[str]:
    """Settings of the same root whose last word is near: "algorithm.bits" lies a level deeper."""
    root, last = key.partition(".")[0], key.rpartition(".")[2]
    within = [k for k in keys if k.startswith(f"{root}.")]
    near = difflib.get_close_matches(last, {k.rpartition(".")[2] for k in within}, n=1, cutoff=0.7)
    return [k for k in within if k.rpartition(".")[2] in near][:1]


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not str(key).startswith("_"):
                yield f"{prefix}{key}"
            yield from _dotted(value, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".:") if str(error) else type(error).__name__


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a resolved configuration by its dotted key."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), node


def origins(config: DictConfig, job: DictConfig) -> dict[str, str]:
    """Where each value came from: the command line, or a file of the configuration.

    job: Hydra's own configuration of the running job. Later in this order wins: a group's file, the
    entry point's file, the experiment's file, the command line.
    """
    folders = [Path(s.path) for s in job.runtime.config_sources if s.schema == "file"]
    choices = {k: v for k, v in job.runtime.choices.items() if v and not k.startswith("hydra/")}
    overridden = {o.split("=", 1)[0].lstrip("+"): o for o in job.overrides.task}
    found = {}
    for key, _ in leaves(OmegaConf.to_container(config, resolve=False)):
        above = [key, *(key[:n] for n, letter in enumerate(key) if letter == ".")]
        typed = next((overridden[a] for a in above if a in overridden and a not in choices), None)
        found[key] = f"command line: {typed}" if typed else _file_of(key, job, choices, folders)
    return found


def _file_of(key: str, job: DictConfig, choices: Mapping[str, str], folders: Sequence[Path]) -> str:
    parts = key.split(".")
    above = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]  # groups lie within groups
    group = next((name for name in above if name in choices), parts[0])
    candidates = [f"{EXPERIMENT}/{choices[EXPERIMENT]}"] if EXPERIMENT in choices else []
    candidates += [job.job.config_name, "common/run"]
    for name in candidates:
        if _holds(name, key, folders):
            return f"{name}.yaml"
    return f"{group}/{choices[group]}.yaml" if group in choices else f"{job.job.config_name}.yaml"


def _holds(name: str, key: str, folders: Sequence[Path]) -> bool:
    path = next((f / f"{name}.yaml" for f in folders if (f / f"{name}.yaml").is_file()), None)
    if path is None:
        return False
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return key in dict(leaves(content)) or key in set(_dotted(content))
