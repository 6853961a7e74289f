"""What a search found beside the best of what it did not, from records written by hand."""

import pytest

from experiments import equal_cost, searched
from tests.experiments.papers import synthetic
from tests.experiments.test_equal_cost import CUT, GPTQ, RTN, SPARSE, sized

MIXED = "algorithm=rtn allocation=mixed allocation.budgets.bits=3.5"
OWL = "algorithm=wanda allocation=owl"


def chosen(loss, part, bits=3.5):
    found = sized(f"{MIXED} allocation.budgets.bits={bits}", loss, part)
    return found | {"search": {"seconds": 321.4}}


def test_every_search_beside_the_best_of_its_bytes():
    """Of no more bytes but for a hundredth, and never another search's."""
    found = [
        synthetic.record("float"),
        sized(GPTQ, 0.1, 0.45),
        sized(RTN, 0.9, 0.3015),
        sized(SPARSE, 0.5, 0.304),
        chosen(0.6, 0.30),
        chosen(0.05, 0.50, 5),
        chosen(0.7, 0.20, 2.5),  # nothing is as small
    ]
    head, small, large = searched.table(found)
    assert [small[1], small[4], large[1], large[4]] == ["30.0 %", "30.1 %", "50.0 %", "45.0 %"]
    assert small[3] == "RTN 3 bit g64" and large[3] == "GPTQ 4 bit g64"
    assert float(small[head.index("Δ loss")]) == pytest.approx(-0.3, abs=0.01)
    assert float(large[head.index("Δ loss")]) == pytest.approx(-0.05, abs=0.01)
    assert small[head.index("search s")] == "321"
    low, high = map(float, small[7].split(" to "))
    assert low < -0.3 < high < 0
    assert searched.markdown(found).startswith("| searched |")
    assert searched.markdown(found[:4]).startswith("No search")


def test_what_a_search_chose_is_a_kind_of_its_own():
    """Scores alone search nothing; rounding, searched or not, leaves multiplications."""
    kinds = [equal_cost.kind(sized(name, 0.5, 0.4)) for name in (MIXED, OWL, CUT)]
    assert kinds == ["quantized, searched", "sparse", "cut"]
    many = [sized(RTN, 0.9, 0.3, 1000), chosen(0.5, 0.3), sized(SPARSE, 0.5, 0.3, 500)]
    assert [each["multiplications"] for each in equal_cost.costs(many)] == [1, 1, 0.5]
