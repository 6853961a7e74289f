from pathlib import Path

import pytest

from experiments.benchmark_report import markdown
from experiments.measurements.algorithms import algorithm_costs
from tests.experiments.papers.synthetic import GPTQ, RTN, record

LAYER = {"layer": 0, "errors": {}, "notes": {}}
TOOK = {  # seconds of each turn, 0.5 of them compilation
    GPTQ + "4": [(2.5, 1.0), (4.5, 1.2)],
    RTN + "4": [(1.5, 0.1), (3.5, 0.3)],
}


def test_what_algorithms_take_beside_the_first():
    places = []

    def run(command, folder, overrides):
        assert command == "compress" and overrides[0] == "data.heldout=2"
        places.append(folder)
        name, turn = " ".join(overrides[1:]), int(folder.name[-1])
        whole, solve = TOOK[name][turn]
        layers = [{**LAYER, "seconds": {"solve": solve / 2, "read": 0.1}}] * 2
        return record(
            name, 0.1, seconds={"compress": whole, "compress_compile": 0.5}, layers=layers
        )

    asked = {"run": ["data.heldout=2"], "algorithms": [n.split() for n in TOOK], "turns": 2}
    rows = algorithm_costs({"algorithm_costs": asked}, Path("there"), run)
    assert len(set(places)) == 4
    gptq, rtn = rows
    assert gptq["times_first"] == 1 and gptq["seconds"] == [2, 4]
    assert rtn["times_first"] == pytest.approx((1 / 2 + 3 / 4) / 2)  # each turn by itself
    assert rtn["phases_with_compile"] == pytest.approx({"solve": 0.2, "read": 0.2})
    found = record("float", results={"algorithm_costs": rows})
    shown = markdown(found, "algorithm_costs")
    assert "times GPTQ 4 bit g64's time" in shown
    assert "| RTN 4 bit g64 | 0.62 | 2.0 | 0.5 | 0.2 | 0.0 | 0.0 | 0.2 | 0.0 |" in shown
