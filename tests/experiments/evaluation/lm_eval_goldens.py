"""The tiny model and tasks that lm-eval's Hugging Face backend ran: tests/peers/make_lm_eval.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.checkpoints.sources import Source
from experiments.endpoints import Endpoint
from experiments.evaluation.tasks import Tasks

FOLDER = Path(__file__).parents[2] / "golden" / "lm_eval"
CASES = ("choices", "choices with 2", "cut", "rolling", "answers")
TOLERANCE = 1e-3  # of a log-likelihood, in nats


def tasks(*names: str, **settings: Any) -> Tasks:
    return Tasks(tasks=list(names), include_path=str(FOLDER / "tasks"), **settings)


def expected(folder: Path = FOLDER) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


def asked(model: Source | Endpoint, case: str, **settings: Any) -> dict[str, Any]:
    """One case's responses and metrics, in the form of the golden file."""
    name, _, shots = case.partition(" with ")
    found = tasks(name, num_fewshot=int(shots) if shots else None, **settings).answers(model)
    return {
        "responses": [sample["filtered_resps"] for sample in found["samples"][name]],
        "metrics": found["results"][name],
    }


def compare(found: dict[str, Any], golden: dict[str, Any], *, atol: float = TOLERANCE) -> None:
    """Every response and every metric are the same, log-likelihoods within `atol`."""
    for ours, theirs in zip(found["responses"], golden["responses"], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            if isinstance(other, str):
                assert one == other
            else:
                mine, its = np.atleast_1d(one), np.atleast_1d(other)  # with greediness, or without
                assert mine[0] == pytest.approx(its[0], abs=atol)
                assert mine[1:].tolist() == its[1:].tolist()
    for key, value in golden["metrics"].items():
        if "_stderr" not in key and key.endswith(",none"):
            assert found["metrics"][key] == pytest.approx(value, rel=atol)
