"""What every algorithm promises, those included that join later: conf/algorithm is the list."""

import contextlib
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.blockwise import BlockwiseMethod
from algorithms.layerwise import LayerwiseMethod, weight_error
from experiments import compress
from experiments.configuration import CONF
from experiments.entry import build
from experiments.errors import UserError
from experiments.operations import work
from experiments.recipe_builder import build_recipe
from tests.experiments import tiny
from tests.experiments.checkpoints.synthetic import CONFIG

ALGORITHMS = sorted(
    path.stem for path in Path(CONF, "algorithm").glob("*.yaml") if path.stem != "none"
)


# Beside the defaults: what a tiny model needs.
TINY = {
    "oats": ["algorithm.iterations=3"],
    "sparsegpt": ["algorithm/format=int", "algorithm.format.group_size=32"],
    "rtn": ["algorithm.format.group_size=32"],
    "gptq": ["algorithm.format.group_size=32"],
    "stochastic_rounding": ["algorithm.format.group_size=32"],
    "hqq": ["algorithm.format.group_size=32"],
    "autoround": ["algorithm.format.group_size=32", "algorithm.steps=4"],
    "omniquant": ["algorithm.format.group_size=32", "algorithm.steps=4"],
    "efficient_qat": ["algorithm.format.group_size=32", "algorithm.steps=4"],
    "aqlm": ["algorithm.codebooks=1", "algorithm.codebook_bits=4", "algorithm.rounds=1"],
    "qtip": ["algorithm.bits=2", "algorithm.state_bits=8"],
    "quip_sharp": ["algorithm.bits=2"],
}


@pytest.fixture(params=ALGORITHMS)
def settings(request):
    return [f"algorithm={request.param}", *TINY.get(request.param, [])]


@pytest.fixture
def method(config, settings):
    return build(config(*settings), "algorithm")


def seeded(method):
    return isinstance(method, LayerwiseMethod) and method.seeded


def observes(method):
    return isinstance(method, LayerwiseMethod) and method.observe is not None


def compressed(method, w, x=None):
    """The method on one layer, as the walk would call it; a learned one before it learns."""
    stats = None
    if observes(method):
        stats = method.observe(method.init(w.shape[1]), x)
    key = (jax.random.key(0),) if seeded(method) else ()
    return method.compress(w, stats, *key), stats


def error(method, w, dense, stats):
    return (
        weight_error(w, dense, stats)
        if not isinstance(method, LayerwiseMethod)
        else (method.error(w, dense, stats))
    )


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(128, 64)), rng.normal(size=(200, 64))
    x[:, 5] = 0  # a dead input
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


@contextlib.contextmanager
def compilations():
    """The programs that are compiled meanwhile, as a list that grows."""
    found = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.some("gptq", "autoround", "qtip")
def test_the_same_bytes_again_and_no_compilation_for_more_blocks(config, settings, tmp_path):
    """Bytes in other processes too: test_resume.py kills them. One program per shape, whatever the
    depth: learning loops included.
    """
    first = compress.run(config(*settings)).checkpoint
    again = compress.run(config(*settings, "again=true")).checkpoint
    assert again != first and tiny.files(again) == tiny.files(first)

    (tmp_path / "deeper").mkdir()
    path = tiny.write_model(tmp_path / "deeper", dataclasses.replace(CONFIG, layers=4))
    with compilations() as more:
        record = compress.run(config(*settings, f"model.path={path}")).record
    assert len(record["layers"]) == 4 and not more


def test_a_compilation_is_noticed():
    with compilations() as found:
        jax.jit(lambda x: x + 271828)(1.0)
    assert len(found) == 1


@pytest.mark.some("gptq", "autoround", "qtip")
def test_only_a_seeded_method_depends_on_its_seed(config, settings, method):
    first = compress.run(config(*settings)).checkpoint
    other = compress.run(config(*settings, "seeds.method=1")).checkpoint
    parts = [tiny.files(folder / "parts") for folder in (first, other)]
    if not isinstance(method, BlockwiseMethod):  # a few steps may end alike in any order
        assert (parts[0] == parts[1]) is not seeded(method)
    data = compress.run(config(*settings, "seeds.data=1")).checkpoint  # windows are drawn evenly
    assert tiny.files(data / "parts") == parts[0]


def test_statistics_cost_no_more_than_their_tokens(method):
    """Counted operations of twice the activations are at most twice as many."""
    if not observes(method):
        pytest.skip("it looks at no activations of single sites")
    stats = jax.eval_shape(functools.partial(method.init, 64))

    def operations(tokens):
        x = jax.ShapeDtypeStruct((tokens, 64), jnp.float32)
        found = work(method.observe, stats, x)
        return found.products + found.moved

    assert 0 < operations(512) < operations(1024) <= 2 * operations(512)


@pytest.mark.some(5)
def test_jitted_and_eager_agree(method, layer):
    eager, stats = compressed(method, *layer)
    key = (jax.random.key(0),) if seeded(method) else ()
    jitted = jax.jit(method.compress)(layer[0], stats, *key)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), eager) == jax.tree.map(
        lambda a: (a.shape, a.dtype), jitted
    )
    # Compilers may contract a product and a sum, which moves what lies on a tie.
    same = np.mean(np.asarray(eager.dequantize()) == np.asarray(jitted.dequantize()))
    assert same > 0.98


def test_a_dead_input_and_a_row_of_zeros_stay_finite(method, layer):
    w, x = layer
    tensor, stats = compressed(method, w.at[3].set(0), x)
    dense = tensor.dequantize()
    assert dense.shape == w.shape and jnp.isfinite(dense).all()
    assert jnp.isfinite(error(method, w, dense, stats))
    if getattr(method, "row_block", 1) == 1:  # else rows share what each is rotated or coded with
        assert not dense[3].any()


def test_a_layer_of_zeros_is_kept_and_costs_nothing(method, layer):
    zeros = jnp.zeros_like(layer[0])
    tensor, stats = compressed(method, zeros, layer[1])
    assert not tensor.dequantize().any()
    assert error(method, zeros, tensor.dequantize(), stats) == 0


def test_what_is_stored_is_what_is_counted(method, layer):
    tensor, _ = compressed(method, *layer)
    assert tensor.storage_bits() == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(tensor))
    pieces = tensor.split([64, 64])
    joined = jnp.concatenate([piece.dequantize() for piece in pieces])
    np.testing.assert_array_equal(joined, tensor.dequantize())


@pytest.mark.some(5)
def test_one_window_of_two_tokens_is_enough_or_refused(config, settings):
    """Statistics of rank two: damping holds, or one sentence says what is singular."""
    few = [*settings, "data.calibration=1", "data.context=2"]
    try:
        record = compress.run(config(*few)).record
    except UserError as error:
        assert "singular" in str(error) and "Block 0" in str(error)
    else:
        assert np.isfinite(record["metrics"]["perplexity"]["value"])


@pytest.mark.some("rtn", "gptq", "autoround")
def test_a_weight_that_is_not_finite_is_named(config, settings, tmp_path, monkeypatch):
    tensors = tiny.tensors()
    tensors["blocks.1.mlp.up.weight"][3, 4] = np.nan
    monkeypatch.setattr(tiny, "tensors", lambda config=None: tensors)
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight in .* has 1 NaN or infinite"):
        compress.run(config(*settings))


@pytest.mark.some("rtn", "gptq", "autoround")
def test_activations_that_are_not_finite_are_named(config, settings, method, monkeypatch):
    """float16 could not hold them either; weights are finite, their products are not."""
    tensors = tiny.tensors()
    tensors["blocks.1.attention_norm.weight"][:] = 1e38
    monkeypatch.setattr(tiny, "tensors", lambda config=None: tensors)
    settings = [*settings, "walk.dense_dtype=float32"]
    if not isinstance(method, BlockwiseMethod) and not observes(method):
        assert compress.run(config(*settings)).checkpoint.exists()  # it looks at weights alone
        return
    where = r"Block 1: (The activations at attention.input \(attenti|Learning .* began with a loss)"
    with pytest.raises(UserError, match=where):
        compress.run(config(*settings))


@pytest.mark.some("gptq", "wanda", "autoround")
def test_dead_inputs_are_recorded_and_named(config, settings, method, monkeypatch, capfd):
    tensors = tiny.tensors()
    tensors["blocks.0.mlp_norm.weight"][[2, 7]] = 0
    monkeypatch.setattr(tiny, "tensors", lambda config=None: tensors)
    done = compress.run(config(*settings))
    assert np.isfinite(done.record["metrics"]["perplexity"]["value"])
    if getattr(method, "notes", None) is not None:
        assert done.record["layers"][0]["notes"]["mlp.input"] == {"dead_inputs": 2.0}
        said = "Block 0, mlp.input: 2 inputs are zero in all calibration text"
        assert said in done.record["warnings"][0] and said in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", " \n\n "])
@pytest.mark.some("gptq-")
def test_an_empty_text_is_refused(config, settings, tmp_path, text):
    configuration = config(*settings)
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(UserError, match="holds no text"):
        compress.run(configuration)


# What is true of every step around an algorithm; beside the defaults: what a tiny model needs.
GROUPS = ("structure", "rotation", "scaling", "calibration", "activations", "correction", "cache")
OTHERS = ("none", "hc_smoe", "reap")  # which want a mixture of experts
STEPS = [
    f"{group}={path.stem}"
    for group in GROUPS for path in sorted(Path(CONF, group).glob("*")) if path.stem not in OTHERS
] + ["algorithm@pruning=wanda", "algorithm@pruning=sparsegpt"]  # fmt: skip
SMALL = {
    "structure=shortgpt": ["structure.layers=1"],
    "structure=shortened_llama": ["structure.layers=1"],
    "structure=minitron": ["structure.feed_forward=32"],
    "structure=llm_pruner": ["structure.heads=2"],
    "structure=slicegpt": ["structure.hidden=64"],
    "rotation=spinquant": ["rotation.steps=2"],
    "correction=eora": ["correction.rank=4"],
    "correction=lqer": ["correction.rank=4"],
    "correction=svdquant": ["correction.rank=4"],
}


ONE_EACH = (
    "rotation=quarot", "scaling=awq", "calibration=gptaq", "activations=int8_token",
    "correction=lqer", "cache=fp8", "algorithm@pruning=wanda",
)  # fmt: skip


@pytest.fixture(params=STEPS)
def around(request):
    rounding = ["algorithm=rtn", "algorithm.format.group_size=32"]
    return [*rounding, request.param, *SMALL.get(request.param, [])]


@pytest.mark.some(*ONE_EACH)
def test_a_step_gives_the_same_bytes_and_leaves_dead_inputs_finite(config, around, monkeypatch):
    tensors = tiny.tensors()
    tensors["blocks.0.mlp_norm.weight"][[2, 7]] = 0
    tensors["blocks.1.mlp.up.weight"][3] = 0
    monkeypatch.setattr(tiny, "tensors", lambda config=None: tensors)
    first = compress.run(config(*around))
    again = compress.run(config(*around, "again=true"))
    assert tiny.files(again.checkpoint) == tiny.files(first.checkpoint)
    assert np.isfinite(first.record["metrics"]["perplexity"]["value"])


@pytest.mark.some(*[step for step in STEPS if "structure" not in step][::3])  # which have their own
def test_a_step_takes_one_window_of_two_tokens(config, around):
    record = compress.run(config(*around, "data.calibration=1", "data.context=2")).record
    assert np.isfinite(record["metrics"]["perplexity"]["value"])


@pytest.mark.some(*ONE_EACH)
def test_a_step_names_activations_that_are_not_finite(config, around, monkeypatch):
    """float16 could not hold them either; weights are finite, their products are not."""
    tensors = tiny.tensors()
    tensors["blocks.1.attention_norm.weight"][:] = 1e38
    monkeypatch.setattr(tiny, "tensors", lambda config=None: tensors)
    configuration = config(*around, "walk.dense_dtype=float32")
    try:
        compress.run(configuration)
    except UserError as error:  # a rotation takes the norm into weights, and meets it there
        named = "Block 1: The (activations at|weights of).* hold NaN or inf|Learning the rotation"
        assert re.match(named, str(error))
    else:
        assert not build_recipe(configuration, CONFIG).needs_data(CONFIG)
