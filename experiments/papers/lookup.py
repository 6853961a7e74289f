"""Runs by name: the overrides that a page gives, the configuration they compose, its records."""

import contextlib
import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import configuration
from experiments.configuration import CONF, did_you_mean
from experiments.entry import resolved
from experiments.errors import UserError
from experiments.papers.facts import Page, Selection
from experiments.report import Record
from experiments.runs.identity import identity

ALGORITHM = "algorithm="
TRAINING = ("optimizer", "schedule", "outer", "averaging", "sparsity", "precision", "loss",
            "parametrization", "elastic")  # groups of conf/train.yaml alone  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, by the overrides of its command's conf/<command>.yaml; evaluated, by those of
    conf/compress.yaml, its model as it is.
    """

    command: Literal["compress", "evaluate", "train"]
    overrides: tuple[str, ...] = ()
    line: str = dataclasses.field(default="", compare=False)  # the command that makes it

    def __str__(self) -> str:
        return self.line or shlex.join(
            ["python", "-m", f"experiments.{self.command}", *self.overrides]
        )


class NotRecorded(UserError):
    """No record is of a run: what it needs, in words. Any other error is a mistake in its name."""


Find = Callable[[Run], list[Record]]  # one record per seed; NotRecorded: what it needs


def parse(text: str) -> Run:
    """A run as a document's marker names it: overrides apart by spaces, of the model as it is where
    the first word is "float", of a training run where it is "train".
    """
    words = tuple(text.split())
    if words[:1] == ("train",):
        return Run("train", words[1:])
    return Run("evaluate", words[1:]) if words[:1] == ("float",) else Run("compress", words)


def run_at(selection: Selection, scale: str, stem: str, pages: Mapping[str, Page]) -> Run:
    """The run that a check names, at a scale.

    On the page of a training method, it is a training run. It begins with the scale's overrides:
    those of the page of the algorithm that it uses, as one algorithm's experiment sets keys that
    another does not have. Where the first word is a command, it is that command's run, with nothing
    before its overrides. Raises UserError if a page lacks the scale.
    """
    if selection[:1] in (("compress",), ("train",), ("evaluate",)):
        return Run(selection[0], tuple(selection[1:]))  # type: ignore[arg-type]
    if selection == "float":
        first = beginning(stem, scale, pages)
        line = f"python -m experiments.reproduce paper={stem} scale={scale}" if first else ""
        return Run("evaluate", first, line)
    if pages[stem].config.split("/")[1] in TRAINING:
        return Run("train", (*beginning(stem, scale, pages), *selection))
    used = [word.removeprefix(ALGORITHM) for word in selection if word.startswith(ALGORITHM)]
    owners = [owner for owner, page in pages.items() if page.config == _yaml(used)]
    return Run("compress", (*beginning(owners[0] if owners else stem, scale, pages), *selection))


def _yaml(algorithms: list[str]) -> str:
    return f"conf/algorithm/{algorithms[-1]}.yaml" if algorithms else ""


def beginning(stem: str, scale: str, pages: Mapping[str, Page]) -> tuple[str, ...]:
    """The overrides of a page's scale; raises UserError if it has no such scale."""
    scales = pages[stem].scales
    if scale not in scales:
        raise UserError(f"papers/{stem}.md has no scale {scale!r}{did_you_mean(scale, scales)}")
    return scales[scale]


def compose(run: Run) -> DictConfig:
    """The configuration of a run; raises UserError for an override that fits nothing."""
    with _command_set_aside():
        try:
            with hydra.initialize_config_dir(CONF, version_base="1.3"):
                return _composed(run)
        except (HydraException, OmegaConfBaseException) as error:
            command = "train" if run.command == "train" else "compress"
            configuration.check(command, run.overrides)  # which says what was meant
            raise UserError(" ".join(str(error).split())) from error


def _composed(run: Run) -> DictConfig:
    """Overrides are of conf/compress.yaml: an evaluation takes of it what both commands have."""
    if run.command == "evaluate" and not run.overrides:
        return hydra.compose("evaluate")
    if run.command == "train":
        return hydra.compose("train", list(run.overrides))
    config = hydra.compose("compress", list(run.overrides))
    if run.command == "compress":
        return config
    evaluated = hydra.compose("evaluate")
    for key in evaluated.keys() & config.keys():
        evaluated[key] = config._get_node(key)
    return evaluated


@contextlib.contextmanager
def _command_set_aside() -> Iterator[None]:
    """Hydra composes for one command at a time, and this may run within another."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        if outer is not None:
            GlobalHydra.instance().initialize(outer)


@functools.cache
def identity_of(run: Run) -> str:
    """Which experiment a run is; NotRecorded while an input that it names is missing, UserError for
    an override that fits nothing.
    """
    config = compose(run)
    if missing := sorted(map(str, OmegaConf.missing_keys(config))):
        raise NotRecorded(", ".join(f"{key}=…" for key in missing))
    return identity(run.command, resolved(config))


def finder(records: Iterable[Record]) -> Find:
    """Find runs among recorded ones, by identity; what is not there needs its command."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.get("identity", ""), []).append(record)

    def find(run: Run) -> list[Record]:
        try:
            mine = found.get(identity_of(run), [])
        except NotRecorded as error:
            raise NotRecorded(f"`{run}`, and for it: {error}") from error
        except UserError as error:
            raise UserError(f"`{run}` is no run: {str(error).rstrip('.')}") from error
        if not mine:
            raise NotRecorded(f"`{run}`")
        return mine

    return find


def float_model(records: Iterable[Record]) -> list[Record]:
    """The embedded model as it is on protocol E's windows; raises UserError if it is missing."""
    return finder(records)(Run("evaluate"))
