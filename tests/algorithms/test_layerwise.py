import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from algorithms import surgery, walk
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import DenseTensor
from algorithms.walk import NotFiniteError
from models.block import Block, Flow
from models.config import DecoderConfig
from models.decoder import sites
from tests.algorithms.integers import gptq, rtn

CONFIG = DecoderConfig(
    vocabulary=11, hidden=24, layers=1, heads=3, kv_heads=1, head_size=8, feed_forward=32,
    context=64,
)  # fmt: skip
READERS = {path for site in sites(CONFIG, 0) for path in site.readers}


def block(seed=0):
    return Block(CONFIG, 0, rngs=nnx.Rngs(seed))


def chunks(count=3, seed=0):
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    keys = jax.random.split(jax.random.key(seed), count)
    xs = [jax.random.normal(key, (2, 12, CONFIG.hidden)) for key in keys]
    return [Flow(x, x, positions) for x in xs]


def compress_block(block, chunks, method, **settings):
    """One method for every layer."""
    return walk.compress_block(block, chunks, lambda path: method, **settings)


def recorder(log):
    """A method that keeps the weight and logs every activation that it is shown."""

    class Kept:
        def __init__(self, w):
            self.w = w

        def dequantize(self, dtype=None):
            return self.w

        def unpacked(self, dtype=None):
            return DenseTensor(self.w)

        def split(self, rows):
            return [Kept(w) for w in jnp.split(self.w, np.cumsum(rows)[:-1])]

    jax.tree_util.register_pytree_node(Kept, lambda t: ((t.w,), None), lambda _, c: Kept(*c))

    def observe(stats, x):
        jax.debug.callback(lambda x: log.append(np.asarray(x)), x)
        return stats + x.shape[0]

    return LayerwiseMethod(lambda i: jnp.zeros((), jnp.int32), observe, lambda w, stats: Kept(w))


def test_a_method_that_keeps_weights_leaves_the_forward_pass_as_it_is():
    model, flows = block(), chunks()
    expected = [model(flow.residual, flow.positions)[0] for flow in flows]
    result = compress_block(model, flows, recorder([]))
    assert set(result.tensors) == READERS
    for flow, y in zip(flows, expected, strict=True):
        np.testing.assert_allclose(flow.residual, y, rtol=1e-5, atol=1e-5)


def test_every_site_is_observed_once_per_chunk_in_order():
    log = []
    compress_block(block(), chunks(count=3), recorder(log))
    jax.effects_barrier()
    widths = [24, 24, 24, 32]
    assert [x.shape for x in log] == [(24, i) for i in widths for _ in range(3)]


def test_by_blocks_sites_see_the_block_as_it_is_and_later_blocks_what_became_of_it():
    coarse, logs, ends = rtn(bits=2, group_size=8), {}, {}
    for sequential in (False, "block"):
        log, ends[sequential] = [], chunks()
        method = recorder(log)._replace(compress=lambda w, stats: coarse.compress(w, None))
        found = compress_block(block(), ends[sequential], method, sequential=sequential)
        jax.effects_barrier()
        logs[sequential] = log
    for ours, other in zip(logs["block"], logs[False], strict=True):
        np.testing.assert_array_equal(ours, other)
    again = chunks()
    walk.replay_block(block(), found.tensors, again, sequential="block")
    compressed = block()
    walk.set_weights(compressed, found.tensors)
    for flow, end, replayed in zip(chunks(), ends["block"], again, strict=True):
        y = compressed(flow.residual, flow.positions)[0]
        np.testing.assert_allclose(end.residual, y, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(end.residual, replayed.residual)
    assert not np.allclose(ends[False][0].residual, ends["block"][0].residual)


def test_sequential_sites_see_what_compressed_predecessors_produce():
    """The statistics at a site equal those of a block whose earlier weights were replaced."""
    flows, seen = chunks(), {}
    coarse = rtn(bits=2, group_size=8)
    for sequential in (True, False):
        log = []
        method = recorder(log)._replace(compress=lambda w, stats: coarse.compress(w, None))
        compress_block(block(), list(flows), method, sequential=sequential)
        jax.effects_barrier()
        seen[sequential] = log
    np.testing.assert_array_equal(seen[True][0], seen[False][0])  # nothing precedes the first site
    assert not np.allclose(seen[True][3], seen[False][3])
    original = block()
    expected = Flow(*flows[0])
    for stage in original.stages()[:2]:
        expected = stage(expected)
    np.testing.assert_allclose(
        seen[False][3], expected.activation.reshape(-1, 24), rtol=1e-4, atol=1e-5
    )


def test_readers_of_one_site_are_solved_as_one_matrix():
    """Row by row, so q, k and v come out as if each had been compressed alone."""
    model, original = block(), block()
    result = compress_block(model, [], rtn(bits=3, group_size=8))
    for path in READERS:
        w = surgery.get_weight(surgery.linear_at(original, path))
        alone = rtn(bits=3, group_size=8).compress(w, None)
        np.testing.assert_array_equal(result.tensors[path].codes(), alone.codes())
        np.testing.assert_array_equal(result.tensors[path].scale, alone.scale)


def test_a_data_free_method_needs_no_activations():
    result = compress_block(block(), [], rtn(bits=4, group_size=8))
    assert set(result.tensors) == READERS
    assert all(set(report.seconds) == {"solve"} for report in result.reports)


def test_gptq_lowers_the_block_output_error_that_rounding_leaves():
    flows = chunks(count=8)
    expected = [block()(flow.residual, flow.positions)[0] for flow in flows]

    def error(method):
        found, model = list(flows), block()
        compress_block(model, found, method)
        outputs = [model(flow.residual, flow.positions)[0] for flow in flows]
        return sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(outputs, expected, strict=True))

    assert error(gptq(bits=3, group_size=8)) < 0.9 * error(rtn(bits=3, group_size=8))


def test_blocks_of_one_shape_compile_once():
    method = gptq(bits=4, group_size=8)
    compress_block(block(0), chunks(), method)
    counts = [f._cache_size() for f in (walk.run_stage, walk.add, walk._solve)]
    compress_block(block(1), chunks(seed=1), method)
    again = [f._cache_size() for f in (walk.run_stage, walk.add, walk._solve)]
    assert counts == again


def test_what_is_not_finite_is_named():
    model = block()
    surgery.set_weight(model.mlp.up, jnp.full((32, 24), jnp.nan))
    with pytest.raises(NotFiniteError, match=r"mlp.input \(mlp.gate, mlp.up\)"):
        compress_block(model, [], rtn(bits=4, group_size=8))
    flows = chunks()
    flows[1] = flows[1]._replace(residual=flows[1].residual.at[0, 3, 2].set(jnp.inf))
    with pytest.raises(NotFiniteError, match="attention.input"):
        compress_block(block(), flows, gptq(bits=4, group_size=8))


def test_a_singular_hessian_is_refused_and_not_rounded():
    flows = [jax.tree.map(lambda x: x[:1, :4], chunks(1)[0])]  # 4 tokens for 24 channels
    with pytest.raises(NotFiniteError, match="Raise the method.s damping"):
        compress_block(block(), flows, gptq(bits=4, group_size=8, damping=0.0))


def test_methods_are_pure_functions_of_their_arguments():
    """The same block and activations give the same codes."""
    first = compress_block(block(), chunks(), gptq(bits=4, group_size=8))
    again = compress_block(block(), chunks(), gptq(bits=4, group_size=8))
    same = functools.partial(np.testing.assert_array_equal)
    for path in READERS:
        same(first.tensors[path].packed, again.tensors[path].packed)
