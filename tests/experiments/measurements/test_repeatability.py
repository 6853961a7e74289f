import os
from pathlib import Path

import pytest

from experiments.benchmark_report import markdown
from experiments.errors import UserError
from experiments.measurements.repeatability import repeatability
from tests.experiments.papers.synthetic import GPTQ, RTN, record


def asked(*cores):
    return {"repeatability": {"runs": [(RTN + "3").split(), (GPTQ + "3").split()], "cores": cores}}


def test_runs_on_other_cores_stand_beside_one_another():
    before, used = os.sched_getaffinity(0), []

    def run(command, folder, overrides):
        used.append(len(os.sched_getaffinity(0)))
        moved = 0.01 * len(used) if "algorithm=gptq" in overrides else 0.0
        return record(" ".join(overrides), 0.3 + moved, noise=0.0)

    rows = repeatability(asked(1, 1), Path("there"), run)
    assert used == [1, 1, 1, 1] and os.sched_getaffinity(0) == before
    assert [row["difference"] for row in rows] == pytest.approx([0, 0.01], abs=1e-12)
    assert rows[1]["perplexity"][0] < rows[1]["perplexity"][1]
    shown = markdown(record("float", results={"repeatability": rows}), "repeatability")
    assert "| run | on 1 core | on 1 core | Δ loss |" in shown
    assert "| GPTQ 3 bit g64 |" in shown and "| +0.0100 ± 0.0000 |" in shown


@pytest.mark.parametrize("count", [0, 10_000])
def test_cores_that_there_are_not_are_refused(count):
    with pytest.raises(UserError, match=rf"repeatability.cores: {count} must be from 1 to the \d+"):
        repeatability(asked(count), Path("there"), lambda *_: pytest.fail("ran"))
