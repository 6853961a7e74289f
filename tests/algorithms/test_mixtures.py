"""Compressing mixtures of experts: each expert by its own tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import hessian, mixtures, surgery, walk
from algorithms.blockwise import learn_block
from algorithms.formats import integer
from algorithms.low_rank.svd_llm import svd_llm
from algorithms.pruning.oats import oats
from algorithms.quantization.autoround import autoround
from algorithms.quantization.gptaq import gptaq
from algorithms.quantization.gptq import gptq
from algorithms.quantization.rtn import rtn
from algorithms.tensors import ExpertsTensor
from models.block import Flow
from models.config import DecoderConfig, Mixing
from models.decoder import build_block

FORMAT = integer(bits=4, group_size=8, scale_dtype="float32")
MIXING = Mixing(count=4, chosen=2, feed_forward=16, normalized=True, shared=8)
CONFIG = DecoderConfig(
    vocabulary=11, hidden=24, layers=1, heads=3, kv_heads=1, head_size=8, feed_forward=32,
    context=64, experts=MIXING,
)  # fmt: skip
SHORT = integer(bits=4, group_size=4, scale_dtype="float32")  # groups of ranks
EXPERTS = ["mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"]


def block(seed=0, shunned=None):
    """A random block; of tokens whose first channel is large, none is sent to `shunned`."""
    made = build_block(CONFIG, 0, rngs=nnx.Rngs(seed))
    if shunned is not None:
        kernel = made.mlp.router.kernel[...].at[0].set(9.0).at[0, shunned].set(-9.0)
        made.mlp.router.kernel.set_value(kernel)
    return made


def flows(count=3, positive=False):
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    keys = jax.random.split(jax.random.key(1), count)
    xs = [jax.random.normal(key, (2, 12, CONFIG.hidden)) for key in keys]
    xs = [x.at[..., 0].set(20.0) for x in xs] if positive else xs
    return [Flow(x, x, positions) for x in xs]


def at_site(made, chunks, name):
    """The chunks, brought to a site of the block as it is."""
    moving = list(chunks)
    for stage, site in enumerate(made.sites):
        walk.advance(made, moving, stage)
        if site.name == name:
            return moving
    raise AssertionError(name)


def rows_of(moving, expert):
    found = []
    for flow in moving:
        ends = np.cumsum(np.asarray(flow.routing.counts))
        start = ends[expert] - flow.routing.counts[expert]
        found.append(np.asarray(flow.activation)[start : ends[expert]])
    return np.concatenate(found)


def weight(made, path):
    return surgery.get_weight(surgery.linear_at(made, path))


def test_every_token_is_sent_where_its_router_says():
    made = block()
    for flow in at_site(made, flows(), "experts.input"):
        x = np.asarray(flow.mixed).reshape(-1, CONFIG.hidden)
        logits = x @ np.asarray(made.mlp.router.kernel[...])
        chosen = np.argsort(-logits, 1)[:, :2]
        counts = np.bincount(chosen.ravel(), minlength=4)
        np.testing.assert_array_equal(flow.routing.counts, counts)
        ends = np.cumsum(counts)
        for expert in range(4):
            tokens = np.asarray(flow.routing.tokens)[ends[expert] - counts[expert] : ends[expert]]
            np.testing.assert_array_equal(tokens, np.flatnonzero((chosen == expert).any(1)))


def test_rounding_takes_each_expert_as_a_matrix_of_its_own():
    method = rtn(format=FORMAT)
    result = walk.compress_block(block(), [], lambda path: method if path in EXPERTS else None)
    for path in EXPERTS:
        tensor, w = result.tensors[path], weight(block(), path)
        assert isinstance(tensor, ExpertsTensor) and tensor.shape == w.shape
        for expert in range(4):
            alone = method.compress(w[expert], None).dequantize()
            np.testing.assert_array_equal(tensor.dequantize()[expert], alone)


def test_each_expert_is_solved_by_the_tokens_it_gets():
    method = gptq(format=FORMAT)
    result = walk.compress_block(
        block(), flows(), lambda path: method if path in EXPERTS[:2] else None
    )
    moving = at_site(block(), flows(), "experts.input")
    w = jnp.concatenate([weight(block(), path) for path in EXPERTS[:2]], 1)
    for expert in range(4):
        stats = hessian.observe(hessian.init(24), jnp.asarray(rows_of(moving, expert)))
        alone = method.compress(w[expert], stats).dequantize()
        found = [result.tensors[path].dequantize()[expert] for path in EXPERTS[:2]]
        np.testing.assert_allclose(jnp.concatenate(found), alone, atol=1e-6)


@pytest.mark.parametrize(
    "method", [svd_llm(rank_multiple=4, factors=gptq(format=SHORT)), oats(iterations=2)]
)
@pytest.mark.some(1)
def test_each_expert_has_factors_of_its_own(method):
    """Two tensors within one, every array with an axis of experts."""
    tensors = walk.compress_block(
        block(), flows(), lambda path: method if path in EXPERTS[:2] else None
    ).tensors
    moving = at_site(block(), flows(), "experts.input")
    for expert, path in ((0, EXPERTS[0]), (3, EXPERTS[1])):
        stats = method.observe(method.init(24), jnp.asarray(rows_of(moving, expert)))
        alone = jax.jit(method.compress)(weight(block(), path)[expert], stats).dequantize()
        np.testing.assert_allclose(tensors[path].dequantize()[expert], alone, atol=2e-3)
    packed, dense = block(), block()
    for path, tensor in tensors.items():
        tensor.validate()
        surgery.compress_linear(packed, path, tensor)
    walk.set_weights(dense, tensors)
    (flow, *_) = flows()
    run = nnx.jit(lambda made, flow: made(flow.residual, flow.positions)[0])
    np.testing.assert_allclose(run(packed, flow), run(dense, flow), rtol=1e-3, atol=1e-4)


def test_an_expert_without_tokens_is_calibrated_on_all_of_them():
    made, method = block(shunned=2), gptq(format=FORMAT)
    chunks = flows(positive=True)
    moving = at_site(made, chunks, "experts.input")
    assert sum(int(flow.routing.counts[2]) for flow in moving) == 0
    result = walk.compress_block(
        nnx.clone(made), list(chunks), lambda path: method if path in EXPERTS else None
    )
    notes = {report.site: report.notes for report in result.reports}
    assert notes["experts.input"]["unreached_experts"] == [2]
    assert notes["experts.hidden"]["unreached_experts"] == [2]
    x = jnp.concatenate([flow.mixed.reshape(-1, 24) for flow in moving])
    stats = hessian.observe(hessian.init(24), x)
    w = jnp.concatenate([weight(made, path)[2] for path in EXPERTS[:2]])
    found = jnp.concatenate([result.tensors[path].dequantize()[2] for path in EXPERTS[:2]])
    np.testing.assert_allclose(found, method.compress(w, stats).dequantize(), atol=1e-6)
    gate, up = found[:16], found[16:]
    hidden = nnx.silu(x @ gate.T) * (x @ up.T)
    stats = hessian.observe(hessian.init(16), hidden)
    expected = method.compress(weight(made, EXPERTS[2])[2], stats).dequantize()
    np.testing.assert_allclose(result.tensors[EXPERTS[2]].dequantize()[2], expected, atol=1e-5)
    assert all(float(jnp.abs(result.tensors[path].stacked.scale).min()) > 0 for path in EXPERTS)


def test_the_block_computes_on_packed_experts():
    tensors = walk.compress_block(block(), [], lambda _: rtn(format=FORMAT)).tensors
    packed, dense = block(), block()
    for path, tensor in tensors.items():
        surgery.compress_linear(packed, path, tensor)
    walk.set_weights(dense, tensors)
    (flow, *_) = flows()
    run = nnx.jit(lambda made, flow: made(flow.residual, flow.positions)[0])
    np.testing.assert_allclose(run(packed, flow), run(dense, flow), rtol=1e-4, atol=1e-5)
    walk.unpack_layers(packed)
    np.testing.assert_allclose(run(packed, flow), run(dense, flow), rtol=1e-5, atol=1e-6)


def test_learned_rounding_learns_experts_too():
    chunks = flows()
    run = nnx.jit(lambda made, flow: made(flow.residual, flow.positions)[0])
    targets = [flow._replace(residual=run(block(), flow)) for flow in chunks]
    method = autoround(format=integer(bits=2, group_size=8, scale_dtype="float32"), steps=40)
    methods = dict.fromkeys(EXPERTS, method)
    tensors, loss = learn_block(block(), chunks, targets, methods, jax.random.key(0))
    assert loss.last < 0.8 * loss.first
    assert all(isinstance(tensor, ExpertsTensor) for tensor in tensors.values())


def test_pairs_of_activations_have_no_place_where_tokens_go_elsewhere():
    method = gptaq()(gptq(format=FORMAT))
    original = walk.Original(block(), flows())
    with pytest.raises(ValueError, match="experts.input: .* set calibration=none for them"):
        walk.compress_block(
            block(), flows(), lambda path: method if path in EXPERTS else None, original=original
        )


def test_the_program_does_not_grow_with_the_experts():
    def equations(experts):
        w = jax.ShapeDtypeStruct((experts, 8, 16), jnp.float32)
        solve = functools.partial(mixtures.solve, method=rtn(format=FORMAT))
        graph = jax.make_jaxpr(lambda w: solve(w, None, None))(w).jaxpr
        return len(str(graph).splitlines())

    assert equations(16) == equations(64)
