"""The main job on a tiny model, through the same functions and commands that a user runs."""

import os
import textwrap
from pathlib import Path

import numpy as np
import pytest

from experiments import compress, evaluate, records
from experiments.errors import UserError
from tests.experiments import tiny

ROOT = Path(__file__).parents[2]


def test_compress_evaluates_and_records(config, tmp_path):
    # A setting that no other test has: programs of one process are compiled once.
    own = ["algorithm.format.group_size=32", "algorithm.damping=0.0123"]
    done = compress.run(config("algorithm=gptq", *own))
    record = done.record
    assert record == records.read(done.folder / "record.json")
    assert record["status"] == "finished" and len(record["attempts"]) == 1
    assert record["data"]["calibration"] == [6, 16] and record["data"]["tokens"] == 10 * 16
    assert record["config"]["algorithm"]["format"]["group_size"] == 32
    assert len(record["layers"]) == 2
    for layer in record["layers"]:
        assert set(layer["seconds"]) == {"read", "forward", "statistics", "solve", "write"}
        assert all(0 < error < 0.1 for error in layer["errors"].values())
    found = record["metrics"]["perplexity"]
    assert found["windows"] == [4, 16] and len(found["window_losses"]) == 4
    assert record["seconds"]["compress"] > record["seconds"]["compress_compile"] > 0
    assert record["peak_memory"] > 1e7

    again = evaluate.run(config(f"checkpoint={done.checkpoint}", name="evaluate")).record
    assert again["metrics"] == record["metrics"]
    assert again["footprint"] == record["footprint"]
    assert not list(tmp_path.rglob("*.partial"))


def test_more_bits_cost_more_and_lose_less(config, tmp_path):
    float_model = evaluate.run(config(name="evaluate")).record
    loss = {None: float_model["metrics"]["perplexity"]["loss"]}
    size = {}
    for bits in (2, 8):
        record = compress.run(config("algorithm=rtn", f"algorithm.format.bits={bits}",
                                     "algorithm.format.group_size=32")).record  # fmt: skip
        loss[bits] = record["metrics"]["perplexity"]["loss"]
        size[bits] = record["footprint"]["weight_bits"] / record["footprint"]["weights"]
    assert abs(loss[8] - loss[None]) < abs(loss[2] - loss[None])
    assert size == {2: 2 + (16 + 8) / 32, 8: 8 + (16 + 8) / 32}


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            ["algorithm.format.group_size=40"],
            "attention.input.*group_size=40 must divide the input dim",
        ),
        (["algorithm.format.bits=9"], "algorithm: bits=9 must be from 2 to 8"),
        (["algorithm.static_groups=false"], "activation_order=True needs static_groups=True"),
        (["model.path=/nowhere"], "There is no file or folder at /nowhere"),
        (["data.context=1000"], "data.context=1000 is longer than the model allows"),
        (["data.calibration=100000"], "fewer than data.calibration=100000"),
    ],
)
def test_a_mistake_is_a_sentence_before_any_work(config, tmp_path, overrides, sentence):
    defaults = ["algorithm.format.group_size=32"]
    with pytest.raises(UserError, match=sentence):
        compress.run(config(*defaults, *overrides))
    assert not (tmp_path / "runs").exists()


def test_a_record_is_never_overwritten(tmp_path):
    records.write({"schema": 1}, tmp_path)
    with pytest.raises(UserError, match="never overwritten"):
        records.write({"schema": 1}, tmp_path)


def test_the_commands_work_from_a_shell(tmp_path):
    """compress as a multirun, evaluate and generate on what it wrote, from another folder."""
    base = [*tiny.overrides(tmp_path), "algorithm.format.group_size=32"]
    done = tiny.command("experiments.compress", "--multirun", "algorithm=rtn,gptq",
                   "algorithm.format.bits=2,3", *base, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = sorted(tmp_path.glob("runs/compress/*/seed-0/record.json"))
    assert len(found) == 4
    bits = sorted(records.read(path)["config"]["algorithm"]["format"]["bits"] for path in found)
    assert bits == [2, 2, 3, 3]

    checkpoint = found[0].parent / "checkpoint"
    text = f"data.path={tmp_path / 'text.txt'}"
    done = tiny.command("experiments.evaluate", f"checkpoint={checkpoint}", *tiny.OVERRIDES, text,
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stderr

    for extra in ([], ["sampling.temperature=0.7", "sampling.top_k=5", "sampling.top_p=0.9"]):
        done = tiny.command("experiments.generate", f"checkpoint={checkpoint}", "prompt=ab cd",
                       "max_tokens=5", *extra, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("ab cd") and len(done.stdout) > len("ab cd\n")


def test_a_users_mistake_ends_the_command_with_one_sentence(tmp_path):
    done = tiny.command("experiments.compress", "model=local", "model.path=/nowhere", cwd=tmp_path)
    assert done.returncode == 1
    assert "There is no file or folder at /nowhere" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_method_from_outside_the_repository_runs_by_its_target(tmp_path):
    """The README's recipe: one module and one YAML, anywhere on the path."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ternary.py").write_text(
        textwrap.dedent("""
            import jax.numpy as jnp
            from algorithms.elements import Integer
            from algorithms.layerwise import LayerwiseMethod
            from algorithms.tensors import QuantizedTensor

            def ternary(*, threshold):
                def compress(w, stats):
                    scale = jnp.abs(w).mean(1, keepdims=True)
                    sign = jnp.sign(w) * (jnp.abs(w) > threshold * scale)
                    codes = (sign + 2).astype(jnp.uint8)
                    return QuantizedTensor.from_codes(codes, scale, Integer(bits=2, symmetric=True))

                return LayerwiseMethod(None, None, compress)
        """)
    )
    (tmp_path / "conf" / "algorithm").mkdir(parents=True)
    (tmp_path / "conf" / "algorithm" / "ternary.yaml").write_text(
        "_target_: ternary.ternary\nthreshold: 0.5\n"
    )
    done = tiny.command(
        "experiments.compress", "--config-dir", str(tmp_path / "conf"), "algorithm=ternary",
        "algorithm.threshold=0.7", *tiny.overrides(tmp_path), cwd=tmp_path,
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path / "mine")]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/compress/*/seed-0/record.json")
    record = records.read(path)
    assert record["config"]["algorithm"]["_target_"] == "ternary.ternary"
    assert np.isfinite(record["metrics"]["perplexity"]["value"])
