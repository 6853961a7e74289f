"""A mixture of experts in place of a feed-forward layer: each token passes through a few of many.

Shazeer et al., ICLR 2017, arXiv:1701.06538, as Mixtral, OLMoE and Qwen have it: no capacity, no
token dropped. B windows, T tokens, D hidden, E experts, k of them per token, R = B T k rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from kernels.grouped import grouped_matmul
from models.block import Block, Flow, Routing, attention_sites, mlp_sites
from models.config import DecoderConfig
from models.layers import MLP, activate
from models.sites import Site


def mixture_sites(config: DecoderConfig) -> tuple[Site, ...]:
    """What every token passes through comes first, then the experts."""
    assert config.experts is not None
    shared = config.experts.shared > 0
    others = ("mlp.router", "mlp.shared_gate") if shared else ("mlp.router",)
    experts = (
        Site(
            name="experts.input",
            readers=("mlp.experts.gate", "mlp.experts.up"),
            others=others,
            experts=True,
            producer="mlp_norm",
            absorbs_scale=False,
            absorbs_rotation=config.norm == "rms",
        ),
        Site(
            name="experts.hidden",
            readers=("mlp.experts.down",),
            experts=True,
            producer="mlp.experts.up",
            absorbs_scale=False,
            absorbs_rotation=False,
        ),
    )
    return (*mlp_sites(config, "mlp.shared", others), *experts) if shared else experts


class ExpertLinear(nnx.Module):
    """A linear layer for each expert, without bias; the kernel is [E, in, out]."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.experts, self.in_features, self.out_features = experts, inputs, outputs
        initial = nnx.initializers.lecun_normal(batch_axis=0)
        self.kernel = nnx.Param(initial(rngs.params(), (experts, inputs, outputs), jnp.float32))

    def __call__(self, x: Float[Array, "R i"], counts: Int[Array, " E"]) -> Float[Array, "R o"]:
        return grouped_matmul(x, self.kernel[...].astype(x.dtype), counts)


class Experts(nnx.Module):
    """The gated feed-forward layers of all experts."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        e = config.experts
        assert e is not None
        self.activation, self.count = config.activation, e.count
        self.gate = ExpertLinear(e.count, config.hidden, e.feed_forward, rngs=rngs)
        self.up = ExpertLinear(e.count, config.hidden, e.feed_forward, rngs=rngs)
        self.down = ExpertLinear(e.count, e.feed_forward, config.hidden, rngs=rngs)

    def spread(self, x: Float[Array, "R D"], counts: Int[Array, " E"]) -> Float[Array, "R F"]:
        """Everything but the last projection."""
        return activate(self.gate(x, counts), self.activation) * self.up(x, counts)


class Mixture(nnx.Module):
    """Router, experts, and what every token passes through beside them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        e = config.experts
        assert e is not None
        self.chosen, self.normalized, self.has_shared = e.chosen, e.normalized, e.shared > 0
        self.router = nnx.Linear(config.hidden, e.count, use_bias=False, rngs=rngs)
        self.experts = Experts(config, rngs=rngs)
        if self.has_shared:
            self.shared = MLP(config, e.shared, rngs=rngs)
            self.shared_gate = nnx.Linear(config.hidden, 1, use_bias=False, rngs=rngs)

    def route(self, x: Float[Array, "B T D"]) -> Routing:
        """The experts of each token, chosen in float32."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        p = jax.nn.softmax(rows @ self.router.kernel[...].astype(jnp.float32))
        weights, experts = jax.lax.top_k(p, self.chosen)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdims=True)
        order = jnp.argsort(experts.reshape(-1), stable=True)
        counts = jnp.bincount(experts.reshape(-1), length=p.shape[-1])
        return Routing(order // self.chosen, weights.reshape(-1)[order], counts)

    def gather(self, x: Float[Array, "B T D"], routing: Routing) -> Float[Array, "R D"]:
        """The rows that experts read."""
        return x.reshape(-1, x.shape[-1])[routing.tokens]

    def combine(
        self, y: Float[Array, "R D"], routing: Routing, shape: tuple[int, ...]
    ) -> Float[Array, "B T D"]:
        """What the experts gave, summed for each token."""
        y = y * routing.weights.astype(y.dtype)[:, None]
        total = jnp.zeros((shape[0] * shape[1], shape[2]), y.dtype)
        return total.at[routing.tokens].add(y).reshape(shape)

    def shared_output(self, hidden: Float[Array, "B T F"], x: Float[Array, "B T D"]):
        """Of the layers that every token passes through; hidden: what `shared.spread` gave."""
        return jax.nn.sigmoid(self.shared_gate(x)) * self.shared.down(hidden)


class MixtureBlock(Block):
    """A block with a mixture of experts in place of its MLP."""

    @staticmethod
    def wiring(config: DecoderConfig, layer: int) -> tuple[Site, ...]:
        return (*attention_sites(config), *mixture_sites(config))

    @staticmethod
    def feed_forward(config: DecoderConfig, width: int, *, rngs: nnx.Rngs) -> Mixture:
        return Mixture(config, rngs=rngs)

    def stages(self) -> tuple[Callable[[Flow], Flow], ...]:
        first = (self._to_attention_input, self._to_attention_output)
        last = (self._to_experts_hidden, self._to_mixture_output)
        if self.mlp.has_shared:
            shared = (self._to_mlp_input, self._to_shared_hidden, self._past_shared)
            return (*first, *shared, *last)
        return (*first, self._to_experts_input, *last)

    def as_if_sent(
        self, x: Float[Array, "B T D"], expert: Int[Array, ""], site: str
    ) -> Float[Array, "n i"]:
        """What one expert would read at its site if every token of x were sent to it."""
        rows = x.reshape(-1, x.shape[-1])
        if site == "experts.input":
            return rows
        counts = jnp.zeros(self.mlp.experts.count, jnp.int32).at[expert].set(len(rows))
        return self.mlp.experts.spread(rows, counts)

    def _to_experts_input(self, flow: Flow) -> Flow:
        flow = self._to_mlp_input(flow)
        return self._routed(flow, flow.activation)

    def _to_shared_hidden(self, flow: Flow) -> Flow:
        hidden = self.mlp.shared.spread(flow.activation)
        return flow._replace(activation=hidden, mixed=flow.activation)

    def _past_shared(self, flow: Flow) -> Flow:
        assert flow.mixed is not None
        y = self.mlp.shared_output(flow.activation, flow.mixed)
        return self._routed(flow._replace(residual=self.joined(flow, y)), flow.mixed)

    def _routed(self, flow: Flow, x: Float[Array, "B T D"]) -> Flow:
        routing = self.mlp.route(x)
        return flow._replace(activation=self.mlp.gather(x, routing), mixed=x, routing=routing)

    def _to_experts_hidden(self, flow: Flow) -> Flow:
        assert flow.routing is not None
        hidden = self.mlp.experts.spread(flow.activation, flow.routing.counts)
        return flow._replace(activation=hidden)

    def _to_mixture_output(self, flow: Flow) -> Flow:
        assert flow.routing is not None
        y = self.mlp.experts.down(flow.activation, flow.routing.counts)
        residual = self.joined(flow, self.mlp.combine(y, flow.routing, flow.residual.shape))
        return flow._replace(residual=residual, activation=residual, mixed=None, routing=None)
