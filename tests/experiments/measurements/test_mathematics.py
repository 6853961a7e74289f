"""Small measurements of the mathematics: agreement, not time."""

import numpy as np
import pytest

from experiments import plots
from experiments.benchmark_report import markdown
from experiments.measurements import mathematics, spectra
from tests.experiments.test_benchmark_report import MACHINE
from tests.experiments.training import small

SIZES = {"lanczos": 80, "cg": 16, "hadamard": 16, "sinkhorn": 8, "align_neurons": 8,
         "kmeans": 200, "randomized_svd": 64, "randomized_eigh": 64, "pca": 64, "inverse_root": 8,
         "newton_inverse_root": 8, "polar_factor": 8}  # fmt: skip


def test_every_case_has_a_size_here():
    assert SIZES.keys() == mathematics.CASES.keys()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.some("lanczos", "cg", "hadamard", "pca")
def test_ours_and_the_oracle_agree(name, monkeypatch):
    monkeypatch.setattr(mathematics, "FILLED", 0.0)
    asked = {"mathematics": {"turns": 1, "sizes": {name: [SIZES[name]]}}}
    (row,) = mathematics.mathematics(asked)
    assert row["apart"] < (0.2 if name == "kmeans" else 2e-3)  # k-means++ draws what it draws
    assert row["seconds"] > 0 and row["oracle_seconds"] > 0 and row["compile_seconds"] > 0
    shown = markdown(dict(results={"mathematics": [row]}, **MACHINE), "mathematics")
    assert f"| {name} | {row['size']} |" in shown


@pytest.mark.slow
def test_a_spectrum_is_measured_and_drawn(tmp_path):
    run = [o for o in small.overrides(tmp_path) if not o.startswith(("runs=", "batch="))]
    settings = {"run": run, "steps": [0, 2], "examples": 4, "probes": 2, "lanczos": 3}
    found = spectra.spectra({"spectrum": settings})
    first, second = found["rows"]
    assert (first["step"], second["step"]) == (0, 2) and first["loss"] != second["loss"]
    assert np.shape(first["nodes"]) == np.shape(first["weights"]) == (2, 3)
    np.testing.assert_allclose(np.sum(first["weights"], 1), 1, rtol=1e-5)
    shown = markdown(dict(results={"spectrum": found}, **MACHINE), "spectrum")
    assert f"| 2 | {second['loss']:.3f} |" in shown
    path = spectra.picture(found["rows"], tmp_path / "spectrum.png")
    assert plots.drawn_from(path) == spectra.digest(found["rows"])


def test_shares_are_those_of_the_parts_of_the_axis():
    row = {"step": 7, "loss": 1.5, "nodes": [[-2.0, 0.01, 4.0]], "weights": [[0.25, 0.7, 0.05]]}
    _, cells = spectra.table({"rows": [row]})
    assert cells == ["7", "1.500", "-2", "4", "25.00%", "70.00%", "5.00%"]
