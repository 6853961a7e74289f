"""One block of a decoder.

A block is a chain of *stages* that meet at its *sites*: stage s runs the readers of site s - 1 and
everything up to site s. The forward pass is the chain; compression walks the same chain, one site
at a time. Shapes: B windows, T tokens, D hidden, R rows of experts, i inputs of a site's readers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Float, Int

from models.config import DecoderConfig
from models.layers import MLP, Attention, KVCache, norm
from models.sites import Site


def attention_sites(config: DecoderConfig) -> tuple[Site, Site]:
    return (
        Site(
            name="attention.input",
            readers=("attention.q", "attention.k", "attention.v"),
            producer="attention_norm",
            absorbs_scale=True,
            absorbs_rotation=config.norm == "rms",  # once the norm's scale is in its readers
        ),
        Site(
            name="attention.output",
            readers=("attention.o",),
            producer="attention.v",
            absorbs_scale=True,
            per_head=True,  # one scale per key-value channel, shared by its query heads
            absorbs_rotation=True,  # within a head
        ),
    )


def mlp_sites(config: DecoderConfig, path: str, others: tuple[str, ...] = ()) -> tuple[Site, Site]:
    c = config
    return (
        Site(
            name="mlp.input",
            readers=(f"{path}.gate", f"{path}.up") if c.gated else (f"{path}.up",),
            others=others,
            producer="mlp_norm",
            absorbs_scale=not others,  # which would have to take it too
            absorbs_rotation=c.norm == "rms",
        ),
        Site(
            name="mlp.hidden",
            readers=(f"{path}.down",),
            producer=f"{path}.up",
            absorbs_scale=c.gated or c.activation == "relu",  # else it is not linear in up's output
            absorbs_rotation=False,  # what lies between is elementwise
        ),
    )


class Routing(NamedTuple):
    """Which rows go to which expert, sorted by expert. E experts."""

    tokens: Int[Array, " R"]  # the token that each row is of
    weights: Float[Array, " R"]  # what its expert's output counts
    counts: Int[Array, " E"]  # rows of each expert


class Flow(NamedTuple):
    """What travels between the stages of a block."""

    residual: Float[Array, "B T D"]
    activation: Float[Array, "..."]  # the input of the next site's readers: [B, T, i]; of experts,
    # rows [R, i], sorted by expert
    positions: Int[Array, "B T"]
    cache: KVCache | None = None
    mixed: Float[Array, "B T D"] | None = None  # what a mixture of experts reads,
    routing: Routing | None = None  # and who of them reads what; None outside of it


class Block(nnx.Module):
    """One pre-norm transformer block. It may lack attention, its MLP, or both: what is not there
    adds nothing, and has no norm either.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, rngs: nnx.Rngs):
        c, own = config, config.layer(layer)
        self.sites = self.wiring(c, layer)
        self.post_norms, self.residual_scale = c.post_norms, c.residual_scale
        self.has_attention, self.has_mlp = own.kv_heads > 0, own.feed_forward > 0
        if self.has_attention:
            self.attention_norm = norm(c, rngs=rngs)
            self.attention = Attention(c, own, rngs=rngs)
        if self.has_mlp:
            self.mlp_norm = norm(c, rngs=rngs)
            self.mlp = self.feed_forward(c, own.feed_forward, rngs=rngs)
        if c.post_norms and self.has_attention:
            self.attention_post_norm = norm(c, rngs=rngs)
        if c.post_norms and self.has_mlp:
            self.mlp_post_norm = norm(c, rngs=rngs)

    @staticmethod
    def wiring(config: DecoderConfig, layer: int) -> tuple[Site, ...]:
        """Where activations meet linear layers, in the order of the forward pass."""
        own = config.layer(layer)
        return (
            *(attention_sites(config) if own.kv_heads else ()),
            *(mlp_sites(config, "mlp") if own.feed_forward else ()),
        )

    @staticmethod
    def feed_forward(config: DecoderConfig, width: int, *, rngs: nnx.Rngs) -> Any:
        """What follows attention."""
        return MLP(config, width, rngs=rngs)

    def stages(self) -> tuple[Callable[[Flow], Flow], ...]:
        """The chain: stage s ends at site s, the last one at the block's output."""
        first = (self._to_attention_input, self._to_attention_output)
        last = (self._to_mlp_hidden, self._to_output)
        if self.has_attention:
            return (*first, self._to_mlp_input, *last) if self.has_mlp else (*first, self._past)
        return (self._to_mlp_input_at_once, *last) if self.has_mlp else (self._unchanged,)

    def _to_attention_input(self, flow: Flow) -> Flow:
        return flow._replace(activation=self.attention_norm(flow.residual))

    def _to_attention_output(self, flow: Flow) -> Flow:
        mixed, cache = self.attention.mix(flow.activation, flow.positions, flow.cache)
        return flow._replace(activation=mixed, cache=cache)

    def _past(self, flow: Flow) -> Flow:
        """Past attention, with no site behind it."""
        y = self.attention.o(flow.activation)
        residual = self.joined(flow, self.attention_post_norm(y) if self.post_norms else y)
        return flow._replace(residual=residual, activation=residual)

    def _to_mlp_input(self, flow: Flow) -> Flow:
        return self._to_mlp_input_at_once(self._past(flow))

    def _to_mlp_input_at_once(self, flow: Flow) -> Flow:
        return flow._replace(activation=self.mlp_norm(flow.residual))

    def _unchanged(self, flow: Flow) -> Flow:
        return flow._replace(activation=flow.residual)

    def _to_mlp_hidden(self, flow: Flow) -> Flow:
        return flow._replace(activation=self.mlp.spread(flow.activation))

    def _to_output(self, flow: Flow) -> Flow:
        y = self.mlp.down(flow.activation)
        residual = self.joined(flow, self.mlp_post_norm(y) if self.post_norms else y)
        return flow._replace(residual=residual, activation=residual)

    def related(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T n h"], Float[Array, "B T k h"], Float[Array, "B T k h"]]:
        """Queries, keys and values of what enters the block; ValueError where it has none."""
        if not self.has_attention:
            raise ValueError("A block without attention has no queries: name one that has it.")
        return self.attention.projected(self.attention_norm(x), positions)

    def joined(self, flow: Flow, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream with what a sublayer gave."""
        return flow.residual + (y if self.residual_scale == 1 else y * self.residual_scale)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        flow = Flow(x, x, positions, cache)
        for stage in self.stages():
            flow = stage(flow)
        return flow.residual, flow.cache
