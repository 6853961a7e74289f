"""Models that other runs leave, made first if they are not there: what conf/model/made.yaml and
conf/model/soup.yaml name.

One command is then a whole experiment: quantize and go on training, train a teacher and distil it,
finetune one model in several ways and average.
"""

from collections.abc import Sequence
from typing import Any

from experiments.checkpoints.soup import Soup
from experiments.checkpoints.sources import Source, open_source
from experiments.errors import UserError
from experiments.papers.lookup import Run, compose
from experiments.runs.first import first
from experiments.training import classifiers

COMMANDS = ("compress", "train")


def model(command: str, overrides: Sequence[str], runs: str, dry_run: bool = False) -> Any:
    """The checkpoint of the run that overrides of conf/<command>.yaml describe, opened.

    runs: the folder of all runs. Raises UserError for overrides that fit nothing, and in a dry run
    if the model has yet to be made.
    """
    if command not in COMMANDS:
        raise UserError(f"command={command} leaves no model: choose {' or '.join(COMMANDS)}.")
    run = Run(command, tuple(overrides))  # type: ignore[arg-type]
    config = compose(Run(run.command, (*run.overrides, f"runs={runs}")))
    done = first(
        command, config, dry_run=dry_run, doing=f"making the model first: {run}",
        missing=f"the model of `{run}`: run that first",
    )  # fmt: skip
    classifier = done.checkpoint / classifiers.FILE
    return (
        classifiers.trained(str(classifier))
        if classifier.exists()
        else open_source(done.checkpoint)
    )


def soup(
    command: str, overrides: Sequence[str], members: Sequence[str], runs: str, dry_run: bool = False
) -> Soup:
    """The mean of what runs leave that have `overrides` in common, and each those of a member.

    Raises UserError as `model` does, and for classifiers.
    """
    found = [model(command, (*overrides, *each.split()), runs, dry_run) for each in members]
    if not all(isinstance(each, Source) for each in found):
        raise UserError("model=soup is of language models: a classifier's run cannot be read so.")
    return Soup(found)
