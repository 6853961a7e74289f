"""The worked examples of algorithms/README.md, run as they stand there."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.quantization.gptq import gptq
from algorithms.quantization.rtn import rtn
from algorithms.walk import transform_block
from tests.algorithms.test_layerwise import block, chunks

README = Path(__file__).parents[2] / "algorithms" / "README.md"


@pytest.fixture(scope="module")
def mine():
    """The README's Python as a user's module."""
    module = types.ModuleType("mine")
    sys.modules["mine"] = module
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 3 and all(len(e.splitlines()) <= 40 for e in examples)
    for example in examples:
        exec(compile(example, str(README), "exec"), module.__dict__)
    yield module
    del sys.modules["mine"]


def test_a_format_of_ones_own_rounds_to_its_points(mine):
    format = mine.power_of_two(bits=4, group_size=16)
    w = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    tensor = format.quantize(jnp.asarray(w))
    steps = np.asarray(tensor.dequantize()) / np.repeat(np.asarray(tensor.scale, np.float32), 16, 1)
    points = np.concatenate([[0], 2.0 ** -np.arange(7), -(2.0 ** -np.arange(7))])
    assert np.isin(steps, points.astype(np.float32)).all()
    assert tensor.storage_bits() == 6 * (32 * 4 + 2 * 16)


def test_every_method_that_rounds_takes_it(mine):
    format = mine.power_of_two(bits=4, group_size=16)
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(12, 32)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(128, 8)) @ rng.normal(size=(8, 32)), jnp.float32)
    method = gptq(format=format)
    stats = method.observe(method.init(32), x)
    plain = rtn(format=format).compress(w, None).dequantize()
    found = jax.jit(method.compress)(w, stats).dequantize()
    assert method.error(w, found, stats) < 0.8 * method.error(w, plain, stats)


def test_a_scoring_rule_of_ones_own_leaves_the_block_as_it_is(mine):
    model, flows = block(), chunks()
    expected = [model(flow.residual, flow.positions)[0] for flow in flows]
    before = np.asarray(model.mlp.gate.kernel[...])
    transform_block(model, flows, mine.energy())
    assert not np.allclose(model.mlp.gate.kernel[...], before)
    for flow, y in zip(flows, expected, strict=True):
        np.testing.assert_allclose(model(flow.residual, flow.positions)[0], y, atol=1e-4)


def test_a_damped_step_solves_the_damped_system(mine):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)), jnp.float32)
    y = jnp.ones(20)
    step = mine.damped_step(lambda w: x @ w, lambda out: jnp.sum((out - y) ** 2), jnp.zeros(3), 1.0)
    exact = np.linalg.solve(2 * x.T @ x + np.eye(3), -2 * x.T @ y)
    np.testing.assert_allclose(step, exact, rtol=1e-3)
