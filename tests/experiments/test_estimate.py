"""Estimates against the arithmetic floor, against real checkpoints, and against themselves."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rich.console import Console

from algorithms.elements import Integer
from algorithms.layerwise import LayerwiseMethod
from algorithms.quantization.gptaq import gptaq
from algorithms.tensors import QuantizedTensor
from experiments import hardware, operations, streaming
from experiments.checkpoints.planish import CheckpointWriter
from experiments.checkpoints.rotated import quarot, spinquant
from experiments.errors import UserError
from experiments.estimate import Estimate, estimate
from experiments.evaluation import floor
from experiments.evaluation.footprint import bytes_on_disk
from experiments.recipes import Recipe
from models.config import DecoderConfig
from tests.algorithms.integers import gptq, rtn
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG

SMOL = DecoderConfig(
    vocabulary=49152, hidden=576, layers=30, heads=9, kv_heads=3, head_size=64,
    feed_forward=1536, context=2048, tied_embeddings=True,
)  # fmt: skip
LARGE = DecoderConfig(
    vocabulary=128256, hidden=8192, layers=80, heads=64, kv_heads=8, head_size=128,
    feed_forward=28672, context=8192,
)  # fmt: skip


def settings(**changed):
    return {
        "calibration": (32, 512),
        "heldout": (20, 512),
        "walk": streaming.Walk(),
        "evaluation_chunk": 2,
        "views": False,
        "rate": 1e11,
        "base": 0,
    } | changed


GPTQ = gptq()  # one method: what depends on it alone is worked out once


def of(config=SMOL, method=GPTQ, **changed):
    return estimate(config, Recipe(method), **settings(**changed))


def shape(*dimensions):
    return jax.ShapeDtypeStruct(dimensions, jnp.float32)


def test_products_count_two_operations_and_loops_their_length():
    a, b = shape(64, 128), shape(128, 32)
    assert operations.work(jnp.matmul, a, b).products == 2 * 64 * 128 * 32

    def loop(x):
        return lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]

    def inner(x):
        return lax.fori_loop(0, 3, lambda _, c: loop(c), x)

    assert operations.work(loop, shape(64, 64)).products == 7 * 2 * 64**3
    assert operations.work(jax.jit(inner), shape(64, 64)).products == 3 * 7 * 2 * 64**3


def test_a_branch_counts_as_the_dearest_and_a_platforms_as_its_own():
    def either(x):
        return lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x)

    def here(x):
        return lax.platform_dependent(x, cpu=lambda x: x @ x, default=lambda x: x @ x @ x @ x)

    assert operations.work(either, shape(64, 64)).products == 2 * 2 * 64**3
    assert operations.work(here, shape(64, 64)).products == 2 * 64**3


def test_factorizations_count_by_their_dimension():
    x = shape(4, 600, 600)
    assert operations.work(jnp.linalg.cholesky, x).products == pytest.approx(4 * 600**3 / 3)
    solve = jax.scipy.linalg.solve_triangular
    assert operations.work(solve, shape(600, 600), shape(600, 500)).products == 600 * 600 * 500


def test_a_product_with_a_vector_waits_for_memory():
    found = operations.work(jnp.matmul, shape(512, 512), shape(512))
    assert found.products == 0 and found.operations == 2 * 512**2
    assert found.moved == 4 * (512**2 + 2 * 512)


def test_what_is_fused_holds_no_memory():
    x = shape(1000, 1000)
    assert operations.work(lambda x: jnp.sum(jnp.exp(x * 2) + 1), x).temporaries == 4
    assert operations.work(lambda x: jnp.exp(x * 2) + 1, x).temporaries == 4_000_000
    assert operations.work(lambda x: (x @ x) @ (x @ x), x).temporaries == 3 * 4_000_000
    chain = operations.work(lambda x: x @ x @ x @ x @ x, x)
    assert chain.temporaries == 2 * 4_000_000  # what was read is given back


def test_operations_are_those_of_the_floor():
    found, least = of().operations, floor.operations(SMOL, 32, 512)
    # Attention goes in blocks of queries: a few more keys than the mask lets through.
    assert found["forward"] == pytest.approx(least["linear"] + least["attention"], rel=0.04)
    # The Gram kernel computes 10 of 16 tiles where 8 would be half.
    assert found["statistics"] == pytest.approx(least["statistics"] * 10 / 8, rel=0.02)
    assert least["solves"] < found["solve"] < 5 * least["solves"]  # the error is solve's as well


def test_a_data_free_method_runs_nothing_forward():
    found = of(method=rtn())
    assert set(found.operations) == {"solve", "evaluate"}
    assert found.seconds["compress"] < of().seconds["compress"] / 3


def test_evaluation_alone_has_no_compression():
    found = estimate(SMOL, None, **settings(calibration=None))
    assert set(found.memory) == {"evaluate"} and found.disk == 0
    assert found.parameters == 134_515_008
    assert found.operations["evaluate"] == pytest.approx(2 * 20 * 512 * 134.5e6, rel=0.1)


def test_a_users_own_method_is_estimated():
    def compress(w, stats, key):
        codes = jax.random.randint(key, w.shape, 0, 4).astype(jnp.uint8)
        scale = jnp.abs(w).mean(1, keepdims=True) + stats.mean()
        return QuantizedTensor.from_codes(codes, scale, Integer(bits=2, symmetric=True))

    mine = LayerwiseMethod(
        jnp.zeros, lambda stats, x: stats + jnp.abs(x).sum(0), compress, seeded=True
    )
    found = of(method=mine)
    assert 0 < found.operations["statistics"] < of().operations["statistics"] / 50
    assert found.disk < of().disk


@pytest.mark.parametrize(
    "method, dense_dtype",
    [(rtn(group_size=32), None), (rtn(group_size=32, bits=3, symmetric=True), "float16")],
)
def test_the_disk_is_what_a_checkpoint_takes(tmp_path, method, dense_dtype):
    config = dataclasses.replace(CONFIG, hidden=256, feed_forward=512)
    source = tiny.model(tmp_path, config)
    walk = streaming.Walk(dense_dtype=dense_dtype)
    windows = np.zeros((4, 16), np.int32)
    writer = CheckpointWriter(tmp_path / "checkpoint")
    streaming.compress_model(source, writer, Recipe(method), windows, walk)
    writer.finish(source.config, source.tokenizer(), {})
    found = of(source.config, method, walk=walk, calibration=(4, 16), heldout=(4, 16))
    assert found.disk == pytest.approx(bytes_on_disk(tmp_path / "checkpoint"), rel=0.05)


def test_memory_grows_with_windows_and_not_with_depth():
    sizes = [of(calibration=(n, 512)).memory["compress"] for n in (8, 32, 128, 512)]
    assert sizes == sorted(set(sizes))
    activations = 384 * 512 * (576 + 1536) * 4
    assert activations < sizes[3] - sizes[2] < 3 * activations
    deeper = dataclasses.replace(SMOL, layers=300)
    assert of(deeper).memory == of().memory
    assert of(base=10**9).peak == of().peak + 10**9
    assert of(heldout=(4000, 512)).memory["evaluate"] > of().memory["evaluate"] + 4 * 10**9


def test_a_large_model_is_estimated_in_seconds_from_its_shape():
    start = time.perf_counter()
    found = of(LARGE, calibration=(128, 2048), heldout=(40, 2048))
    assert time.perf_counter() - start < 30
    assert found.parameters == pytest.approx(70.6e9, rel=0.01)
    assert 30e9 < found.disk < 50e9
    activations = 128 * 2048 * (8192 + 28672) * 4
    assert activations < found.memory["compress"] < 2 * activations
    assert found.total_seconds > found.operations["forward"] / 1e11


def test_what_the_method_cannot_take_is_its_own_error():
    with pytest.raises(ValueError, match="group_size=100 must divide"):
        of(method=rtn(group_size=100))


def refusal(folder, available, **changed):
    given = settings(**changed)
    with pytest.raises(UserError) as refused:
        hardware.require(
            estimate(LARGE, Recipe(GPTQ), **given),
            memory=available,
            folder=folder,
            alternatives=hardware.smaller(LARGE, Recipe(GPTQ), **given),
        )
    return str(refused.value)


def test_too_little_memory_is_refused_with_what_fits(tmp_path):
    available = 40 * 10**9
    given = {"calibration": (256, 2048), "heldout": (4, 2048)}
    needed = of(LARGE, **given).memory["compress"]
    sentence = refusal(tmp_path, available, **given)
    assert f"memory to compress: {needed / 1e9:.2f} GB needed, 40.00 GB available" in sentence
    advice = dict(p.split("=") for p in sentence.split("; ")[1].split() if "=" in p)
    assert set(advice) <= {"evaluation.chunk", "walk.chunk", "data.calibration"}
    windows = int(advice["data.calibration"])
    again = of(
        LARGE,
        calibration=(windows, 2048),
        heldout=(4, 2048),
        walk=streaming.Walk(chunk=int(advice["walk.chunk"])),
        evaluation_chunk=int(advice["evaluation.chunk"]),
    )
    assert again.peak <= available
    assert f"brings it to {again.peak / 1e9:.2f} GB" in sentence


def test_where_nothing_helps_the_machine_is_named(tmp_path):
    sentence = refusal(tmp_path, 10**9, calibration=(4, 64), heldout=(2, 64))
    assert "no smaller setting fits: the model takes a machine with" in sentence


def test_too_little_disk_is_refused_with_the_numbers(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10**9})
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: usage)
    needed = Estimate(1, {}, {"compress": 1}, {}, 5 * 10**9)
    with pytest.raises(UserError, match=r"needs 5.00 GB, 1.00 GB are free.*runs=\.\.\."):
        hardware.require(needed, memory=10, folder=tmp_path / "not" / "yet")
    hardware.require(needed._replace(disk=10**9), memory=10, folder=tmp_path)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    free = hardware.available_memory()
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 500000\n")
    own = hardware.available_memory() - 2_000_000
    assert 0 < own < free
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.available_memory() > 10**8


def test_hardware_is_what_was_given_or_else_found(monkeypatch):
    given = hardware.Hardware(rate=3e12, memory=10**9)
    assert (given.assumed_rate(), given.assumed_memory()) == (3e12, 10**9)
    assert hardware.Hardware().assumed_memory() > 10**7
    assert 1e8 < hardware.product_rate(0.01) < 1e15 and math.isfinite(hardware.product_rate(0.01))


def test_the_estimate_is_shown_by_part_and_phase():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    with console.file:
        console.print(hardware.describe(of()))
    text = console.export_text()
    for part in ("134.5 million", "statistics", "memory, evaluate", "time, compress", "disk"):
        assert part in text


def test_learning_a_rotation_takes_passes_over_a_model_that_is_held():
    drawn = estimate(SMOL, Recipe(rtn(), rotation=quarot()), **settings())
    learned = estimate(SMOL, Recipe(rtn(), rotation=spinquant(steps=10, tokens=128)), **settings())
    assert "rotation" not in drawn.operations
    blocks = learned.parameters - SMOL.vocabulary * SMOL.hidden
    passes = 10 * 128 * 2 * learned.parameters  # one forward pass in each step
    assert 3 * passes < learned.operations["rotation"] < 6 * passes
    assert learned.memory["compress"] > 2 * 4 * blocks > drawn.memory["compress"]


def test_asymmetric_calibration_takes_a_second_stream():
    alone, aimed = of(), estimate(SMOL, Recipe(GPTQ, calibration=gptaq()), **settings())
    assert aimed.operations["forward"] == pytest.approx(2 * alone.operations["forward"])
    assert aimed.operations["statistics"] > 2 * alone.operations["statistics"]
    buffer = 4 * 32 * 512 * SMOL.hidden
    assert aimed.memory["compress"] >= alone.memory["compress"] + 0.9 * buffer
