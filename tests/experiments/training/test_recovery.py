"""Curves of training from what was compressed, from records written by hand."""

import math

from experiments import plots
from experiments.papers.lookup import finder
from experiments.training import recovery
from tests.experiments.papers import synthetic

CUT = "structure=shortgpt algorithm=none"


def trained(name, seen, loss):
    """A record of distillation, looked at after some steps."""
    found = synthetic.record(f"train experiment={name}", loss)
    found["data"]["calibration"] = [128, 511]
    return found | {"training": {"curves": {"cross_entropy": seen}}}


def cut():
    """What the experiment starts from."""
    of_gptq = synthetic.record("algorithm=gptq", 0.8)
    run = synthetic.parse(CUT)
    return of_gptq | {"config": synthetic.composed(run), "identity": synthetic.identity_of(run)}


def test_a_curve_begins_before_any_token_and_ends_with_what_is_saved(tmp_path):
    reference, start = synthetic.record("float"), cut()
    seen = [[16, 3.7], [32, 3.5], [64, 3.41]]
    record = trained("distilled_depth_smollm2", seen, 0.4)
    (curve,) = recovery.curves([reference, start, record], reference, finder([reference, start]))
    assert curve.name == "ShortGPT 20 %" and curve.tokens == [0, 16384, 32768, 65536]
    assert curve.losses[1:3] == [3.7, 3.5]
    assert math.isclose(curve.losses[0], start["metrics"]["perplexity"]["loss"])
    assert math.isclose(curve.losses[3], record["metrics"]["perplexity"]["loss"])
    drawn = recovery.picture([curve], reference, tmp_path / "curve.png")
    assert plots.drawn_from(drawn) == recovery.digest([curve], reference)


def test_one_look_or_no_start_is_no_curve():
    reference, start = synthetic.record("float"), cut()
    once = trained("distilled_depth_smollm2", [[64, 3.4]], 0.4)
    twice = trained("distilled_depth_smollm2", [[16, 3.7], [64, 3.4]], 0.4)
    other = trained("qad_smollm2", [[16, 3.7], [64, 3.4]], 0.4)
    find = finder([reference, start])
    assert recovery.curves([reference, start, once, other], reference, find) == []
    assert recovery.curves([twice], reference, finder([reference])) == []
    assert len(recovery.curves([twice], reference, find)) == 1
