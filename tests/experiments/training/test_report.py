"""Tables of training runs, from made-up records."""

import numpy as np
from scipy import stats

from experiments.papers.lookup import parse
from experiments.report import label, labels
from experiments.step_labels import training_label
from experiments.training.report import markdown
from tests.experiments.papers import synthetic

MUON, ADAMW = (2.0, 2.1, 2.3), (2.3, 2.35, 2.65)


def trained(settings, values, metric="cross_entropy"):
    return [
        synthetic.of(
            parse(f"train experiment=c1 {settings}"), seed=seed,
            training={"heldout": {"cross_entropy": 1.0} | {metric: value}},
            model={"parameters": 119_000}, seconds={"train": 30.0},
        )
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_a_run_is_named_by_all_that_trains_it():
    method = "optimizer=muon loss=forward_kl parametrization=lsq sparsity=rigl averaging=ema"
    (record,) = trained(method, [1.0])
    assert label(record) == "Muon 200 steps + forward KL + LSQ + RigL + EMA"
    assert training_label(synthetic.composed(parse("train"))) == "AdamW 200 steps"
    qad = synthetic.composed(parse("train experiment=qad_smollm2"))
    assert training_label(qad) == "AdamW 64 steps + forward KL + STE from algorithm=gptq bits=3"
    rates = [trained(f"learning_rates={rate}", [1.0])[0] for rate in (1, 2)]
    assert labels(rates)[1] == "AdamW 200 steps learning_rates=2"


def test_seeds_are_paired_with_those_of_the_first():
    found = markdown(trained("", ADAMW) + trained("optimizer=muon", MUON))
    _, _, first, second = found.splitlines()[:4]
    test = stats.ttest_rel(MUON, ADAMW)
    half = (test.confidence_interval().high - test.confidence_interval().low) / 2
    assert first.startswith("| AdamW 200 steps | 3 | 2.4333 ± ") and "| – | – | 119,000" in first
    assert f"| -0.3000 ± {half:.4f} | {test.pvalue:.2g} |" in second


def test_a_classifier_is_known_by_its_accuracy():
    found = markdown(
        trained("", (0.9, 0.92), "accuracy") + trained("steps=9", (0.8, 0.81), "accuracy")
    )
    assert "accuracy, %" in found and "| 91.00 ± 12.71 |" in found and "| -10.50 ± 6.35 |" in found


def test_one_seed_is_compared_by_window():
    models = [
        synthetic.of(
            parse(f"train experiment=c1 steps={steps}"), loss, model={"parameters": 9},
            training={"heldout": {"cross_entropy": 1.0}}, seconds={"train": 1.0},
        )
        for steps, loss in ((1, 0.2), (2, 0.1))
    ]  # fmt: skip
    first, second = (model["metrics"]["perplexity"]["window_losses"] for model in models)
    row = markdown(models).splitlines()[3]
    assert f"| {np.mean(np.subtract(second, first)):+.4f} ± " in row and "| < 1e-16 |" in row
