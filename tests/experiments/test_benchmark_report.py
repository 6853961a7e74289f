import pytest

from experiments.benchmark_report import markdown
from experiments.errors import UserError

MACHINE = dict(device=dict(cores=2, machine="x86_64"), versions=dict(jax="0.11.2"))


def test_speed_is_shown_with_its_machine():
    row = dict(calibration=32, seconds=40.0, compile_seconds=5.0, times_faster=3.1, times_floor=1.7,
               llmcompressor=[dict(seconds=124.0)], floor_seconds=dict(linear=20.0, solves=3.5),
               parts_with_compile=dict(read=2.0, forward=21.0))  # fmt: skip
    memory = [dict(blocks=4, peak_memory=10**9, times_least=1.0)]
    perplexity = dict(seconds=30.0, compile_seconds=1.0)
    benchmark = dict(results=dict(gptq=[row], memory=memory, perplexity=perplexity), **MACHINE)
    shown = markdown(benchmark, "gptq")
    assert "| 32 | 40.0 | 5.0 | 124 | 3.10 | 23.5 | 1.70 | 2.0 | 21.0 |" in shown
    assert "2 cores (x86_64), jax 0.11.2" in shown
    assert "| 30.0 | 1.0 | – | – | – | – |" in markdown(benchmark, "perplexity")
    assert "| 4 | 1.000 | 1.000 |" in markdown(benchmark, "memory")


def test_damaged_files_are_shown_by_what_was_damaged():
    def counts(a, r, f):
        return {"accepted": a, "refused": r, "finding": f}

    kinds = {
        "cut off": counts(1, 9, 0),
        "extended": counts(2, 3, 0),
        "GGUF: a name": counts(0, 4, 1),
    }
    row = {"files": 20, **counts(3, 16, 1), "kinds": kinds}
    benchmark = dict(results=dict(hostile=row), **MACHINE)
    shown = markdown(benchmark, "hostile")
    assert "| any bytes, any file | 15 | 3 | 12 | 0 |" in shown
    assert "| GGUF, edited | 5 | 0 | 4 | 1 |" in shown
    assert "| all | 20 | 3 | 16 | 1 |" in shown


def test_what_training_costs_is_shown():
    trainer = {
        "bare_positions_per_second": [100.0, 102.0, 98.0],
        "trainer_positions_per_second": [99.0, 100.0, 97.0],
        "overhead": 0.015,
        "compilations": 1,
        "memory": {"arguments": 2e6, "temporaries": 30e6},
        "estimated_memory": 700e6,
    }
    costs = [
        dict(optimizer=name, times_adamw=times, nanoseconds_per_parameter=times * 2,
             state_bytes_per_parameter=8.0, temporaries_per_parameter=0.0)
        for name, times in (("soap", 12.0), ("sgd", 0.5))
    ]  # fmt: skip
    record = dict(results=dict(trainer=trainer, optimizer_costs=costs), **MACHINE)
    assert "| 100 | 99 | +1.5% | 1 | 2.0 | 30.0 | 700.0 |" in markdown(record, "trainer")
    shown = markdown(record, "optimizer_costs")
    assert shown.index("| sgd | 0.50 | 1.00 | 8.0 | 0.0 |") < shown.index("| soap | 12.00 |")


def test_a_benchmark_without_a_table_is_refused():
    with pytest.raises(UserError, match="benchmark=trainr has no table; did you mean trainer"):
        markdown(dict(results={}, **MACHINE), "trainr")
