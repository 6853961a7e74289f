"""Kinds of compression at equal cost, from records written by hand."""

import pytest

from experiments import equal_cost, plots
from tests.experiments.papers import synthetic

WHOLE = 10**6
FLOAT, GPTQ, RTN = "float", "algorithm=gptq", "algorithm=rtn algorithm.format.bits=3"
SPARSE, CUT = "algorithm=wanda", "structure=shortgpt algorithm=none"
BOTH = "algorithm=gptq structure=shortgpt"


def sized(name, loss, part, multiplications=None):
    """A run's record, with the bytes of a part of the model in 16 bits."""
    size = {"weights": 9, "weight_bits": 36, "parameters": WHOLE,
            "model_bits": int(16 * WHOLE * part), "multiplications": multiplications}  # fmt: skip
    plain = synthetic.composed(synthetic.parse(name))
    return synthetic.record(GPTQ, loss, footprint=size) | {"config": plain}


@pytest.fixture
def records():
    return [
        synthetic.record(FLOAT),
        sized(GPTQ, 0.1, 0.45),  # of before multiplications were counted
        sized(RTN, 0.9, 0.35, 1000),
        sized(SPARSE, 0.6, 0.62, 550),
        sized(CUT, 0.7, 0.79, 700),
        sized(BOTH, 0.8, 0.40, 700),
    ]


def test_a_kind_is_what_was_done(records):
    found = [equal_cost.kind(record) for record in records]
    both = "cut, quantized"
    assert found == ["as it is", "quantized", "quantized", "sparse", "cut", both]
    codes = sized("algorithm=sparsegpt algorithm/format=int", 0.6, 0.4)
    factors = sized("algorithm=svd_llm algorithm@algorithm.factors=rtn", 0.6, 0.4)
    assert equal_cost.kind(codes) == "sparse, quantized"
    assert equal_cost.kind(factors) == "low rank, quantized"
    recipe = [records[4]["config"]["structure"]]
    trained = records[4] | {"command": "train", "recipe": recipe}
    assert equal_cost.kind(trained) == "cut, trained"
    model = {"command": "compress", "overrides": ["structure=shortgpt", "algorithm=none"]}
    trained = {"command": "train", "config": {"model": model}}
    assert equal_cost.kind(trained) == "cut, trained"
    model = {"command": "train", "overrides": ["experiment=distilled_depth_smollm2"]}
    after = records[1] | {"config": records[1]["config"] | {"model": model}}
    assert equal_cost.kind(after) == "cut, trained, quantized"
    chosen = sized("algorithm=rtn allocation=mixed allocation.budgets.bits=3.5", 0.6, 0.4)
    assert equal_cost.kind(chosen) == "quantized, searched"
    chosen = sized("structure=puzzle structure.budgets.parameters=0.8 algorithm=none", 0.6, 0.8)
    assert equal_cost.kind(chosen) == "cut"  # sizes are what every structure chooses


def test_costs_are_parts_of_the_whole_model(records):
    """Rounding leaves multiplications as they are; of others nothing is made up."""
    found = equal_cost.costs(records[1:])
    assert [each["bytes"] for each in found] == pytest.approx([0.45, 0.35, 0.62, 0.79, 0.40])
    parts = [1, 1, 0.55, 0.7, 0.7]
    assert [each["multiplications"] for each in found] == pytest.approx(parts)
    unsaid = sized(SPARSE, 0.6, 0.62)
    assert equal_cost.costs([*records[1:], unsaid])[-1]["multiplications"] is None
    trained = equal_cost.costs([*records[1:], sized(CUT, 0.5, 1.58, 700)])[-1]  # in float32
    assert trained == {"bytes": None, "multiplications": pytest.approx(0.7)}
    unknown = equal_cost.costs(records[3:])  # nobody says what the whole model takes
    assert {each["multiplications"] for each in unknown} == {None}


def test_the_best_of_each_kind_within_a_budget(records):
    head, *rows = equal_cost.table(records, "bytes")
    assert head == ["bytes at most", "cut", "cut, quantized", "quantized", "sparse"]
    names = ("gptq", "rtn", "wanda", "cut", "both")
    values = [f"{record['metrics']['perplexity']['value']:.2f}" for record in records[1:]]
    value = dict(zip(names, values, strict=True))
    assert rows[0][:2] == ["80 %", f"{value['cut']} ShortGPT 20 %"]
    assert rows[0][3] == f"**{value['gptq']}** GPTQ 4 bit g64"
    assert rows[1][1] == "–" and rows[1][4].startswith(value["wanda"])
    narrow = rows[4]  # 38 %
    assert narrow[1:3] == ["–", "–"] and narrow[3].startswith(f"**{value['rtn']}**")
    assert rows[5][1:] == ["–"] * 4
    head, *rows = equal_cost.table(records, "multiplications")
    assert rows[-2][4].startswith("**") and rows[-2][3] == "–"  # 60 %: zeros alone


def test_the_picture_is_of_the_numbers(records, tmp_path):
    drawn = equal_cost.picture(records, tmp_path / "costs.png")
    assert plots.drawn_from(drawn) == equal_cost.digest(records)
    assert equal_cost.digest(records) != equal_cost.digest(records[:-1])
