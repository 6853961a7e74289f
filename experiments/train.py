"""Train a model or distil into one, and record it: python -m experiments.train --help"""

from typing import Any

from flax import nnx
from omegaconf import DictConfig

from experiments import records
from experiments.checkpoints.planish import Checkpoint
from experiments.entry import entry_point, resolved
from experiments.evaluation.footprint import bytes_on_disk, footprint
from experiments.progress import console
from experiments.runs import run as runs
from experiments.training import classifiers, parallel, saving
from experiments.training.loop import train
from experiments.training.offline import with_stored_logits
from experiments.training.planning import Plan, plan
from experiments.training.report import table
from models.decoder import Decoder
from models.mlp import MLPClassifier


def run(config: DictConfig) -> runs.Run | None:
    """Train, evaluate, record: given back if finished before, gone on with if interrupted.

    None in processes that train along with the first.
    """
    plain = resolved(config)
    parallel.Processes(**plain["processes"]).begin()
    at = runs.place("train", plain)
    return runs.finished(at) or _run(config, plain, at)


def one(config: DictConfig) -> runs.Run:
    """A run of this process alone."""
    done = run(config)
    assert done is not None
    return done


def prepare(config: DictConfig) -> Plan:
    """What the configuration asks for, and what it will take."""
    return plan(config)


def _run(config: DictConfig, plain: dict[str, Any], at: runs.Place) -> runs.Run | None:
    planned = prepare(config)
    planned.require(at.folder)
    if not parallel.leads():
        _along(planned)
        return None
    with runs.begin(at) as run:
        with run.recorder.phase("teach"):
            job, taught = with_stored_logits(planned.job(), run.folder)
        with run.recorder.phase("train"):
            state = train(job, run)
        found: dict[str, Any] = {"training": {**job.summary(run.folder), **taught}}
        model = job.trained(state)
        if planned.source is not None:
            found |= _kept(planned, model, run, at)
        elif isinstance(model, MLPClassifier):
            classifiers.save(model, run.folder / "checkpoint")
        return run.finish(
            model=planned.facts(), data=job.examples.facts(), estimate=planned.estimate.facts(),
            **found,
        )  # fmt: skip


def _along(planned: Plan) -> None:
    """In a process that is not the first: it trains along, and writes nothing."""
    job = planned.job()
    job.trained(train(job, None))


def _kept(planned: Plan, model: nnx.Module, run: runs.OpenRun, at: runs.Place) -> dict[str, Any]:
    """The checkpoint of a language model, and what it is worth."""
    assert planned.source is not None and planned.windows is not None
    folder = run.folder / "checkpoint"
    if not folder.exists():
        notes = {
            "identity": at.identity,
            "recipe": planned.recipe(),
            "source": planned.facts(),
            "calibration": {"name": planned.windows.name, "digest": planned.windows.digest},
        }
        assert isinstance(model, Decoder)
        saving.save(model, folder, planned.source.tokenizer(), notes, check=run.claim.check)
    kept = Checkpoint(folder)
    with run.recorder.phase("evaluate"):
        metrics = planned.evaluation(kept, planned.windows)
    size = footprint(kept.config, kept.description["tensors"])._asdict()
    return {"metrics": metrics, "footprint": size, "bytes_on_disk": bytes_on_disk(folder)}


@entry_point("train")
def main(config: DictConfig) -> runs.Run | None:
    done = run(config)
    if done is None:
        return None
    console.print(table([done.record]))
    if done.checkpoint.exists():
        console.print(f"checkpoint: {done.checkpoint}", soft_wrap=True)
    console.print(f"record:     {done.folder / records.FILE}", soft_wrap=True)
    return done


if __name__ == "__main__":
    main()
