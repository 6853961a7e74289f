"""Tasks of lm-eval whose questions come out of a published package: the files in tasks/.

A file there is a task in lm-eval's own format without its data. The first time that it is asked
for, the questions are fetched and written to the cache as JSON lines, with the task beside them, so
that any lm-eval runs it with `--include_path`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from experiments.checkpoints.packages import cache_folder
from experiments.checkpoints.source_packages import fetch_source_member
from experiments.files import write_whole

TASKS = Path(__file__).with_name("tasks")


def names() -> list[str]:
    """The tasks that can be prepared."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def prepare(name: str, *, cache: Path | None = None) -> Path:
    """The folder with a task and its questions, fetched and written the first time only."""
    cache = cache_folder() if cache is None else cache
    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    of = task["metadata"]
    source = fetch_source_member(
        of["package"], of["release"], of["member"], of["sha256"], size=of["size"], cache=cache
    )
    folder = cache / "tasks" / name
    folder.mkdir(parents=True, exist_ok=True)
    questions = folder / f"{name}.jsonl"
    _write(questions, "".join(f"{json.dumps(q)}\n" for q in bigbench(source)))
    task["dataset_kwargs"] = {"data_files": {task["test_split"]: str(questions.resolve())}}
    _write(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))
    return folder


def bigbench(path: Path) -> Iterator[dict[str, Any]]:
    """Questions of a BIG-bench multiple choice task: question, choices, the right one's index."""
    for example in json.loads(path.read_text(encoding="utf-8"))["examples"]:
        scores = example["target_scores"]
        yield {
            "question": example["input"].strip(),
            "choices": list(scores),
            "answer": list(scores.values()).index(1),
        }


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)
