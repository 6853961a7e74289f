"""A block of an encoder such as BERT: norms behind each sum, and none before.

What a norm gives is both read and added to, so that no scale can move between it and its readers.
"""

import dataclasses

from models.block import Block, Flow, attention_sites, mlp_sites
from models.config import DecoderConfig
from models.sites import Site


class EncoderBlock(Block):
    """x <- norm(x + attention(x)), then norm(x + mlp(x))."""

    @staticmethod
    def wiring(config: DecoderConfig, layer: int) -> tuple[Site, ...]:
        found = (*attention_sites(config), *mlp_sites(config, "mlp"))
        return tuple(
            dataclasses.replace(site, absorbs_scale=False, absorbs_rotation=False)
            if site.producer.endswith("norm") else site
            for site in found
        )  # fmt: skip

    def _to_attention_input(self, flow: Flow) -> Flow:
        return flow._replace(activation=flow.residual)

    def _to_mlp_input(self, flow: Flow) -> Flow:
        residual = self.attention_norm(flow.residual + self.attention.o(flow.activation))
        return flow._replace(residual=residual, activation=residual)

    def _to_output(self, flow: Flow) -> Flow:
        residual = self.mlp_norm(flow.residual + self.mlp.down(flow.activation))
        return flow._replace(residual=residual, activation=residual)
