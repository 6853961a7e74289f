"""Tasks of lm-eval on a model or an endpoint: what conf/evaluation/lm_eval.yaml names.

lm-eval (Gao et al., github.com/EleutherAI/lm-evaluation-harness) makes the prompts, draws the
examples in front of them, and judges the answers; the model is ours, or an endpoint's. Every
question's own score is kept, so that models are compared in pairs.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.checkpoints.sources import Source
from experiments.configuration import did_you_mean
from experiments.endpoints import Endpoint
from experiments.errors import UserError
from experiments.evaluation import packaged_tasks
from experiments.evaluation.scoring import PORTION, padded

if TYPE_CHECKING:
    from lm_eval.api.model import LM

BOOTSTRAP = 1000  # resamples behind a standard error that has no formula
OUR_FACTS = ("name", "alias", "sample_len", "sample_count")  # in lm-eval's results, no metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """Which tasks, and how they are asked; called with a model, the metrics of a record."""

    tasks: str | Sequence[str]
    limit: int | float | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    apply_chat_template: bool = False
    batch: int = 2048
    fewshot_seed: int = 1234
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.names:
            raise UserError("evaluation=lm_eval needs to know which tasks: give tasks=NAME.")
        for option, value in (("limit", self.limit), ("batch", self.batch)):
            if value is not None and not value > 0:
                raise UserError(f"evaluation.{option}={value} must be more than 0.")
        if self.include_path is not None and not Path(self.include_path).expanduser().is_dir():
            raise UserError(
                f"There is no folder at evaluation.include_path={self.include_path}: check it."
            )

    @property
    def names(self) -> list[str]:
        return [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)

    @functools.cached_property
    def _manager(self) -> Any:
        return _manager(self.names, self.include_path)

    @functools.cached_property
    def opened(self) -> list[Any]:
        """lm-eval's tasks and groups. Raises UserError for one that is unknown or out of reach."""
        manager, found = self._manager, []
        for name in self.names:
            try:
                with _quiet():
                    task = manager.load(name)
            except Exception as error:  # whatever its file, its libraries or the network raise
                raise UserError(
                    f"Task {name} cannot be opened ({_first_line(error)}): its data may need the "
                    "network, its metrics a library, or its file may be wrong."
                ) from error
            found.append(task)
        return found

    def kinds(self) -> dict[str, str]:
        """What each task asks of a model: multiple_choice, generate_until, …"""
        return {
            name: task.OUTPUT_TYPE
            for loaded in self.opened
            for name, task in loaded["tasks"].items()
        }

    def __call__(self, model: Source | Endpoint, windows: object = None) -> dict[str, Any]:
        """The metrics of a record; `windows` of text are of no use here."""
        return {"tasks": results(self.answers(model), self.limit), "lm_eval": version()}

    def answers(self, model: Source | Endpoint) -> dict[str, Any]:
        """What lm-eval says of the model, every question with its answers."""
        tops = [_top(loaded, name) for loaded, name in zip(self.opened, self.names, strict=True)]
        lm, chat = self._model(model)
        import lm_eval.evaluator

        with _quiet():
            return lm_eval.evaluator.simple_evaluate(
                lm,
                tasks=[each for top in tops for each in top],
                task_manager=self._manager,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                apply_chat_template=chat,
                fewshot_random_seed=self.fewshot_seed,
                bootstrap_iters=BOOTSTRAP,
            )

    def work(self, source: Source) -> tuple[tuple[int, int], int, int]:
        """What `estimate` takes as held-out windows and as chunk, and how many times over.

        Prompts are counted as they are padded; the tokens of generated answers are not.
        """
        from experiments.evaluation.lm_eval_model import PlanishLM

        lm = PlanishLM(source, batch=self.batch, seed=self.seed)
        lengths = [
            padded(min(len(lm.tok_encode(text)), lm.max_length), lm.max_length)
            for task in self._asked(lm)
            for text in texts(task)
        ]
        longest = max(lengths)
        windows = math.ceil(sum(lengths) / longest)
        at_once = max(1, PORTION // (4 * source.config.hidden * longest))
        chunk = max(1, self.batch // longest)
        return (min(windows, at_once), longest), chunk, math.ceil(windows / at_once)

    def _asked(self, lm: "LM") -> Iterator[Any]:
        """Each task with its requests made, as lm-eval will make them again."""
        from lm_eval.evaluator_utils import get_sample_size

        for task in (task for loaded in self.opened for task in loaded["tasks"].values()):
            said = task.get_config("num_fewshot")
            if said is None or (self.num_fewshot is not None and said != 0):
                task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
            task.set_fewshot_seed(seed=self.fewshot_seed)
            with _quiet():
                task.build_all_requests(
                    limit=get_sample_size(task, self.limit), rank=0, world_size=1,
                    apply_chat_template=self.apply_chat_template, fewshot_as_multiturn=True,
                    chat_template=lm.apply_chat_template if self.apply_chat_template else None,
                    tokenizer_name=lm.tokenizer_name if self.apply_chat_template else "",
                )  # fmt: skip
            yield task

    def _model(self, model: Source | Endpoint) -> "tuple[LM, bool]":
        """Who answers, and whether in a conversation."""
        if isinstance(model, Endpoint):
            return model.asked(chat=self.apply_chat_template, seed=self.seed)
        from experiments.evaluation.lm_eval_model import PlanishLM

        return PlanishLM(model, batch=self.batch, seed=self.seed), self.apply_chat_template


def texts(task: Any) -> list[str]:
    """What a task's requests are made of: their contexts with their continuations."""
    return ["".join(part for part in each.args if isinstance(part, str)) for each in task.instances]


def version() -> str:
    return importlib.metadata.version("lm_eval")


def _top(loaded: Mapping[str, Any], name: str) -> list[Any]:
    """The group of that name, or the tasks that it stands for."""
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's index of tasks; its own thousands are read only where they are asked for."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation=lm_eval needs lm-eval, which is not installed: pip install -e '.[eval]'."
        )
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # of the bootstrap: a fork would share JAX
    ours = [str(packaged_tasks.prepare(name)) for name in names if name in packaged_tasks.names()]
    paths = [*ours, *([str(Path(include_path).expanduser())] if include_path else [])]
    with _quiet():
        manager = _index(paths, everything=False)
        if set(names) - set(manager.all_tasks):
            manager = _index(paths, everything=True)
    known = [*manager.all_tasks, *packaged_tasks.names()]
    for name in names:
        if name not in known:
            raise UserError(f"There is no task {name}{did_you_mean(name, known)}")
    return manager


def _index(paths: Sequence[str], *, everything: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths), include_defaults=everything)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval warns of every default that it fills in."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def results(found: Mapping[str, Any], limit: int | float | None) -> dict[str, Any]:
    """Of each task and group, as a record keeps it: what was asked, and each metric.

    A metric has its value, its standard error or None, and of a task every question's own score.
    """
    return {
        name: {
            "version": found["versions"].get(name),
            "fewshot": found["n-shot"].get(name),
            "limit": limit,
            **_questions(found, name),
            **_metrics(found, name, values),
        }
        for name, values in found["results"].items()
    }


def _questions(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name not in found["samples"]:
        return {"tasks": found["group_subtasks"][name]}
    asked = {s["doc_id"]: [s["doc_hash"], s["prompt_hash"], s["target_hash"]]
             for s in found["samples"][name]}  # fmt: skip
    content = json.dumps(list(asked.values())).encode()
    return {"n": len(asked), "digest": hashlib.sha256(content).hexdigest()}


def _metrics(found: Mapping[str, Any], name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    better, metrics = found["higher_is_better"].get(name, {}), {}
    for key, value in values.items():
        metric, _, how = key.partition(",")
        if key in OUR_FACTS or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{how}")
        scores = [s[metric] for s in found["samples"].get(name, [])
                  if s["filter"] == how and metric in s]  # fmt: skip
        metrics[metric if how == "none" else f"{metric},{how}"] = {
            "value": value,
            "standard_error": error if isinstance(error, float) else None,
            "higher_is_better": better.get(metric),
            **({"sample_scores": [_plain(each) for each in scores]} if scores else {}),
        }
    return metrics


def _plain(score: Any) -> Any:
    """A question's score as JSON: a number, or the parts that the metric adds up."""
    if isinstance(score, (tuple, list)):
        return [_plain(part) for part in score]
    if isinstance(score, (bool, int, float, str)) or score is None:
        return score
    return float(score)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
