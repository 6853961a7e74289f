import copy

import numpy as np
import pytest
from rich.console import Console

from experiments import plots, report
from experiments.errors import UserError
from experiments.step_labels import step_label


def record(method=None, bits=4, losses=(3.0, 3.2, 3.4), **algorithm):
    perplexity = {
        "value": float(np.exp(np.mean(losses))),
        "standard_error": 0.5,
        "loss": float(np.mean(losses)),
        "loss_standard_error": 0.1,
        "window_losses": list(losses),
        "windows": [len(losses), 16],
        "data": {"name": "text", "digest": "d"},
    }
    found = {
        "command": "compress" if method else "evaluate",
        "config": {},
        "metrics": {"perplexity": perplexity},
        "seconds": {"evaluate": 1.0},
        "bytes_on_disk": 5_000_000,
        "peak_memory": 2 * 10**9,
        "data": {"calibration": [32, 512]},
    }
    if method:
        grid = {"_target_": "algorithms.formats.integer", "bits": bits, "group_size": 64}
        grid |= {key: algorithm.pop(key) for key in ("group_size", "symmetric") if key in algorithm}
        settings = {"_target_": f"algorithms.{method}", "format": grid}
        found["config"] = {"algorithm": settings | algorithm}
        found["seconds"]["compress"] = 12.0
        found["layers"] = [{"seconds": {"solve": 1.0}, "errors": {}}]
        found["footprint"] = dict(weights=1000, weight_bits=1000 * bits + 375, parameters=2000,
                                  model_bits=20_000 + 1000 * bits)  # fmt: skip
    return found


def test_windows_were_observed_by_sites_or_by_learning():
    found = record("x.gptq")
    found["layers"] = [{"seconds": {"solve": 1.0}, "errors": {"mlp.input": 0.1}}]
    assert report.calibration(found) == "–"
    found["layers"] = [{"seconds": {"statistics": 1.0}, "errors": {"mlp.input": 0.1}}]
    assert report.calibration(found) == "32 × 512"
    found["layers"] = [{"seconds": {"solve": 1.0}, "errors": {"block": 0.1}}]
    assert report.calibration(found) == "32 × 512"


def test_labels_say_what_was_done():
    assert report.label(record()) == "float"
    assert report.label(record("x.gptq")) == "GPTQ 4 bit g64"
    assert report.label(record("x.rtn", group_size=None, symmetric=True)) == (
        "RTN 4 bit per channel symmetric"
    )
    inner = record("x.gptq")["config"]["algorithm"]
    factorized = {"_target_": "x.svd_llm", "ratio": 0.8, "factors": inner}
    assert step_label(factorized) == "SVD-LLM 80 % left in GPTQ 4 bit g64"
    again = record("x.gptq")
    again["config"]["model"] = {"command": "train", "overrides": ["experiment=c1", "steps=9"]}
    assert report.label(again) == "GPTQ 4 bit g64 from experiment=c1 steps=9"
    again["config"] |= {"algorithm": None, "walk": {"dense_dtype": "float16"}}
    assert report.label(again) == "float16 from experiment=c1 steps=9"


def test_differences_are_paired_by_window():
    reference, other = record(), record("x.rtn", losses=(3.1, 3.3, 3.8))
    mean, error = report.paired_difference(other, reference)
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(np.std([0.1, 0.1, 0.4], ddof=1) / np.sqrt(3))
    elsewhere = copy.deepcopy(reference)
    elsewhere["metrics"]["perplexity"]["data"]["digest"] = "other"
    assert report.paired_difference(other, elsewhere) is None


def test_a_table_fits_a_terminal_of_eighty_columns():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(report.table([record(), record("x.gptq"), record("x.rtn", bits=3)]))
    text = console.export_text()
    assert "…" not in text
    assert "GPTQ 4 bit g64" in text and "+0.000 ± 0.000" in text and "4.38" in text


def test_markdown_has_a_cell_for_every_column():
    lines = report.markdown([record(), record("x.gptq")]).split("\n\n")[0].splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_the_picture_is_written_whole(tmp_path):
    path = tmp_path / "picture.png"
    low, high = (3.1, 3.3, 3.6), (3.5, 3.9, 3.8)
    found = [record(), record("x.gptq", losses=low), record("x.gptq", bits=3, losses=high)]
    found.append(record("x.rtn", losses=high))
    assert plots.perplexity_against_size(found, path) == path
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
    assert plots.drawn_from(path) == plots.records_digest(found)


def test_a_picture_knows_the_numbers_it_was_drawn_from(tmp_path):
    found = [record(), record("x.gptq", losses=(3.1, 3.3, 3.6))]
    digest = plots.records_digest(found)
    plots.pareto(found, tmp_path / "picture.png")
    assert plots.drawn_from(tmp_path / "picture.png") == digest
    found[1]["metrics"]["perplexity"]["value"] += 0.01
    assert plots.records_digest(found) != digest
    (tmp_path / "cut.png").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        plots.drawn_from(tmp_path / "cut.png")


def test_the_front_holds_what_nothing_beats():
    low, high = (3.1, 3.3, 3.6), (3.5, 3.9, 3.8)
    small, large = record("x.gptq", bits=3, losses=high), record("x.gptq", losses=low)
    beaten = record("x.rtn", losses=high)  # as large as `large`, as bad as `small`
    assert plots.front([large, beaten, small]) == [small, large]


def test_experiments_of_one_label_are_told_apart():
    default = {"activation_order": True, "damping": 0.01}
    found = [record("x.gptq", **default | change) for change in (
        {}, {"activation_order": False}, {"damping": 0.1}, {"bits": 3})]  # fmt: skip
    assert report.labels(found) == [
        "GPTQ 4 bit g64",
        "GPTQ 4 bit g64 activation_order=false",
        "GPTQ 4 bit g64 damping=0.1",
        "GPTQ 3 bit g64",
    ]
    assert report.labels(found[:2]) == [  # neither is the common one
        "GPTQ 4 bit g64 activation_order=true",
        "GPTQ 4 bit g64 activation_order=false",
    ]
    seeded = [found[0] | {"seeds": {"data": seed, "method": seed}} for seed in (0, 1)]
    assert report.labels(seeded) == ["GPTQ 4 bit g64 seed-0", "GPTQ 4 bit g64 seed-1"]


def test_a_step_that_is_left_out_tells_none_apart():
    early, late = record("x.gptq"), record("x.gptq")
    late["config"] |= {"rotation": {}, "scaling": None, "rules": []}
    assert report.labels([early, late]) == ["GPTQ 4 bit g64"] * 2
    other = record("x.gptq")
    other["config"] |= {"extra": {"kind": "random"}}
    assert report.labels([early, late, other]) == [
        "GPTQ 4 bit g64", "GPTQ 4 bit g64", "GPTQ 4 bit g64 kind=random"
    ]  # fmt: skip


def test_a_number_is_found_by_its_place():
    assert report.number(record(), "seconds.evaluate") == 1.0
    with pytest.raises(UserError, match="record of float has no number at seconds.compress"):
        report.number(record(), "seconds.compress")
