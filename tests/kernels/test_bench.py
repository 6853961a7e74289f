"""The benchmark on made-up operations: what it writes down, never how fast anything is."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from kernels import bench, dispatch, profile, timing
from kernels.workload import Cost, Workload


def product(x, w, *, implementation):
    forms = {"reference": lambda x, w: x @ w, "xla": lambda x, w: x @ w + 1e-3}
    return dispatch.run("product", forms, implementation, x, w)


def arguments(key, n):
    return tuple(jax.random.normal(key, (2, n, n)))


def workload(n, operations=None, **more):
    cost = Cost(12 * n * n, operations or 2 * n**3, "float32")
    return Workload(functools.partial(arguments, n=n), product, cost, f"n={n}", jnp.matmul, **more)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    found = {"product": {"small": workload(8), "large": workload(16, operations=10**18)}}
    monkeypatch.setattr(bench, "operations", lambda: found)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "rates", lambda: bench.Rates(1e10, {"float32": 1e11}))
    monkeypatch.setattr(timing, "CACHED", 4096)
    monkeypatch.setattr(timing, "ROUNDS", (3, 3))
    monkeypatch.setattr(bench, "version", lambda op: "one")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bench", *words])
        bench.main()
        return json.loads((tmp_path / "cpu.json").read_text())

    return run


def test_a_row_says_what_was_timed_and_how_far_it_is_from_float64(made_up, capsys):
    (row,) = made_up()["rows"]
    assert row["shape"] == "small" and set(row["seconds"]) == {"xla", "plain"}
    assert all(seconds > 0 for seconds in row["seconds"].values())
    assert row["roofline_seconds"] == max(12 * 64 / 1e10, 2 * 512 / 1e11)
    assert row["errors"]["xla"] == pytest.approx(1e-3 / 2.83, rel=0.3)  # entries are ~ √8
    said = capsys.readouterr().out
    assert "This is a cpu: kernels do not run here, XLA's forms do." in said
    assert "product large: 10000000.0 s a run at this device's rates, left out" in said


def test_what_was_measured_stays_until_the_code_changes(made_up, capsys, monkeypatch):
    first = made_up()
    assert made_up() == first and "product small: kept" in capsys.readouterr().out
    assert made_up("--again") != first
    monkeypatch.setattr(bench, "version", lambda op: "two")
    assert made_up("product", "small")["rows"][0]["version"] == "two"


def test_parts_measure_what_the_whole_does(made_up, monkeypatch):
    each = {"product": {"one": workload(4), "two": workload(8), "three": workload(12)}}
    monkeypatch.setattr(bench, "operations", lambda: each)
    first = made_up("--part", "1/2")
    assert [row["shape"] for row in first["rows"]] == ["one", "three"]
    both = made_up("--part", "2/2")
    assert both["rows"][:2] == first["rows"] and both["rows"][2]["shape"] == "two"


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "one"])
def test_a_part_that_is_none_is_said(made_up, wrong, capsys):
    with pytest.raises(SystemExit):
        made_up("--part", wrong)
    assert f"{wrong!r} is no part: write 1/8, 2/8, … 8/8" in capsys.readouterr().err


def test_what_there_is_not_is_said(made_up):
    with pytest.raises(SystemExit, match="no operation 'gram' with shapes: choose product"):
        made_up("gram")
    with pytest.raises(SystemExit, match="no shape 'tiny': choose small, large"):
        made_up("product", "tiny")


def test_a_form_that_cannot_run_is_refused_not_dropped(made_up, monkeypatch):
    def refuse(*_):
        raise ValueError("xla takes no such thing")

    whole = workload(8)._replace(run=lambda *_, implementation: refuse())
    monkeypatch.setattr(bench, "operations", lambda: {"product": {"small": whole}})
    (row,) = made_up()["rows"]
    assert row["refused"] == {"xla": "xla takes no such thing"} and set(row["seconds"]) == {"plain"}


def test_what_fails_on_the_device_is_said_and_the_rest_measured(made_up, monkeypatch, capsys):
    def fail(*_, implementation):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    found = {"too large": workload(4)._replace(run=fail), "small": workload(8)}
    monkeypatch.setattr(bench, "operations", lambda: {"product": found})
    with pytest.raises(SystemExit, match="1 of 2 could not be measured"):
        made_up("--part", "1/1")
    said = capsys.readouterr().out
    assert "product too large: RESOURCE_EXHAUSTED" in said and "[2/2] product small: " in said


def test_a_profile_is_of_kernels(made_up, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["profile", "product", "small"])
    with pytest.raises(SystemExit, match="This is a cpu: kernels run on GPUs of compute 9.0."):
        profile.main()


def test_real_operations_are_found():
    assert all(workloads for workloads in bench.operations().values())
    assert bench.version("gram") != bench.version("hadamard")
