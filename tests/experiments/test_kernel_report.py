import jax.numpy as jnp
import pytest

from experiments import kernel_report, plots
from experiments.errors import UserError
from kernels import bench
from kernels.workload import Cost, Workload

COST = Cost(10**7, 10**9, "bfloat16")


def device(kind, platform, **seconds):
    row = {
        "op": "product", "shape": "o", "cost": COST._asdict(),
        "roofline_seconds": 1e-5, "seconds": seconds, "errors": {"xla": 1e-4, "mosaic": 2e-3},
        "refused": {}, "version": "x",
    }  # fmt: skip
    rates = {"bytes": 4e12, "operations": {"bfloat16": 7e14}}
    return {
        "device": {"kind": kind, "platform": platform, "capability": None},
        "jax": "0.11.2", "rates": rates, "rows": [row],
    }  # fmt: skip


GPU = device("NVIDIA H200", "cuda", mosaic=2e-5, xla=3e-5, plain=5e-5)
CPU = device("cpu", "cpu", xla=1e-2, plain=2e-2)


@pytest.fixture(autouse=True)
def operations(monkeypatch):
    one = Workload(lambda key: (jnp.ones(3),), lambda x: x, COST, "M<=16")
    monkeypatch.setattr(bench, "operations", lambda: {"product": {"o": one}})
    monkeypatch.setattr(bench, "version", lambda op: "x")


def test_a_table_has_each_device_and_says_what_no_gpu_has_shown():
    header, on_cpu, nowhere = kernel_report.table("product", [CPU])
    assert dict(zip(header, on_cpu, strict=True))["times dense"] == "2.00"
    assert nowhere[3] == "not yet measured on a GPU" and set(nowhere[4:]) == {"–"}
    header, on_cpu, on_gpu = kernel_report.table("product", [CPU, GPU])
    found = dict(zip(header, on_gpu, strict=True))
    assert (found["kernel, µs"], found["times XLA"], found["times dense"]) == (
        "20.0",
        "1.50",
        "2.50",
    )
    assert (found["of roofline"], found["error"]) == ("50 %", "2.0e-03")
    with pytest.raises(UserError, match="no operation 'gram' with shapes: product"):
        kernel_report.table("gram", [])


def test_times_of_code_that_has_changed_are_told_apart(monkeypatch):
    monkeypatch.setattr(bench, "version", lambda op: "y")
    _, row = kernel_report.table("product", [GPU])
    assert row[3] == "NVIDIA H200, earlier code"
    assert kernel_report.summary([GPU])[1][1] == "NVIDIA H200, earlier code"


def test_a_summary_has_the_least_and_the_most_of_an_operation():
    both = {**GPU, "rows": GPU["rows"] + device("", "cuda", mosaic=1e-4, xla=8e-5)["rows"]}
    header, row = kernel_report.summary([CPU, both])
    found = dict(zip(header, row, strict=True))
    assert (found["device"], found["shapes"], found["faster than XLA's"]) == (
        "NVIDIA H200",
        "2",
        "1",
    )
    assert found["times XLA"] == "0.80 to 1.50" and found["times dense"] == "2.50 to 2.50"
    assert found["of roofline"] == "10 to 50 %" and found["largest error"] == "2.0e-03"
    assert "4.00 TB/s of a copy, and in square products 700 (bfloat16)" in kernel_report.rates(
        [GPU]
    )


def test_what_was_measured_is_what_dispatch_goes_by():
    slower = device("NVIDIA H200", "cuda", mosaic=4e-5, xla=3e-5)
    key = ("NVIDIA H200", "product", "M<=16")
    assert kernel_report.faster([GPU]) == {key: 1.5}
    assert kernel_report.faster([GPU, slower, CPU]) == {key: 0.75}  # the worst of a bucket
    source = '"""Text."""\n\nTIMES_FASTER: dict[tuple[str, str, str], float] = {}\n'
    assert kernel_report.measured_source(source, [CPU]) == source
    written = kernel_report.measured_source(source, [GPU])
    scope: dict = {}
    exec(written, scope)
    assert scope["TIMES_FASTER"] == {key: 1.5}
    assert kernel_report.measured_source(written, [GPU]) == written


@pytest.mark.parametrize("shown", [CPU, GPU])
def test_a_roofline_carries_what_it_was_drawn_from(shown, tmp_path):
    ((path, draw, digest),) = kernel_report.pictures([shown], tmp_path)
    assert plots.drawn_from(draw(path)) == digest
