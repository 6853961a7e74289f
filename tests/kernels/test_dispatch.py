"""Which implementation runs, without any of them."""

from types import SimpleNamespace

import pytest

from kernels import dispatch, measured

FORMS = {
    name: lambda *_, name=name, **more: (name, more) for name in ("reference", "xla", "mosaic")
}
HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
OLDER = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")


def test_the_automatic_choice_on_a_cpu_is_xla_and_says_why():
    assert dispatch.run("op", FORMS, "auto", bucket="M<=16")[0] == "xla"
    said = dispatch.choices()["op, M<=16"]
    assert said["implementation"] == "xla"
    assert (
        said["reason"]
        == "the kernel needs an NVIDIA GPU of compute capability 9.0, and this is a cpu"
    )


def test_a_kernel_is_chosen_where_it_was_measured_to_be_faster(monkeypatch):
    times = {("NVIDIA H200", "op", "fast"): 1.5, ("NVIDIA H200", "op", "slow"): 0.9}
    monkeypatch.setattr(measured, "TIMES_FASTER", times)
    with dispatch.compiling_for(HOPPER):
        assert dispatch.run("op", FORMS, "auto", bucket="fast") == ("mosaic", {"interpret": False})
        assert dispatch.run("op", FORMS, "auto", bucket="slow")[0] == "xla"
        assert dispatch.run("op", FORMS, "auto", bucket="other")[0] == "xla"
        assert dispatch.run("op", FORMS, "auto", bucket="fast", lacks="takes no such")[0] == "xla"
    reasons = {name: choice["reason"] for name, choice in dispatch.choices().items()}
    assert reasons["op, slow"] == "the kernel is 0.90 times as fast on NVIDIA H200"
    assert reasons["op, other"] == "the kernel was not measured on NVIDIA H200 for other"


def test_a_named_kernel_runs_unmeasured_or_is_refused_with_the_reason():
    with dispatch.compiling_for(HOPPER):
        assert dispatch.run("op", FORMS, "mosaic") == ("mosaic", {"interpret": False})
        with pytest.raises(ValueError, match="'mosaic' of op takes no K=7: choose 'xla'"):
            dispatch.run("op", FORMS, "mosaic", lacks="takes no K=7")
    with dispatch.compiling_for(OLDER), pytest.raises(ValueError, match="this is compute 8.0"):
        dispatch.run("op", FORMS, "mosaic")
    with pytest.raises(ValueError, match="this is a cpu: choose 'xla', or 'interpret'"):
        dispatch.run("op", FORMS, "mosaic")


def test_the_interpreter_runs_the_kernel_anywhere():
    assert dispatch.run("op", FORMS, "interpret", bits=4) == (
        "mosaic",
        {"bits": 4, "interpret": True},
    )


def test_what_there_is_not_is_refused():
    with pytest.raises(
        ValueError, match="'triton' is not one of auto, reference, xla, mosaic, int"
    ):
        dispatch.run("op", FORMS, "triton")
    plain = {name: FORMS[name] for name in ("reference", "xla")}
    with pytest.raises(ValueError, match="'mosaic' is not one of auto, reference, xla"):
        dispatch.run("op", plain, "mosaic")
