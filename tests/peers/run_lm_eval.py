"""Tasks by lm-eval's own Hugging Face backend:
`python run_lm_eval.py FOLDER --tasks A,B --include FOLDER --out JSON [--limit N] [--fewshot N]`.

In float32 on the CPU. Writes, of every task, each question's responses as the model gave them
(log-likelihoods with their greediness, texts) and the task's metrics.
"""

import argparse
import json
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--include", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fewshot", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("highest")
    found = evaluate(
        arguments.folder, arguments.tasks.split(","), arguments.include, limit=arguments.limit,
        num_fewshot=arguments.fewshot,
    )  # fmt: skip
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def evaluate(folder: Path, tasks: list[str], include: Path, **options) -> dict:
    """Responses and metrics of each task."""
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(include), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )
    return {
        task: {
            "responses": [s["filtered_resps"] for s in samples],
            "metrics": {k: v for k, v in found["results"][task].items() if ",none" in k},
        }
        for task, samples in found["samples"].items()
    }


if __name__ == "__main__":
    main()
