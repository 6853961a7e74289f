"""What other tools reach on the same windows: papers/peers.yaml, by size."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.errors import UserError
from experiments.papers.facts import strict
from experiments.report import Record, bits_per_weight
from experiments.step_labels import element_bits

FILE = "peers.yaml"
DENSE = 16  # bits of a weight that is not quantized


class Size(NamedTuple):
    """What results are compared within."""

    bits: int  # whole ones per weight that stays
    activations: int | None  # bits; None: float
    zeros: str | None  # which weights are zero, "50 %" or "2:4"; None: none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One tool's result; its difference to the float model, or else its perplexity."""

    tool: str
    method: str
    bits: float  # per compressed weight; of pruned ones, of each that stays
    windows: int  # held out
    activations: int | None = None  # bits
    zeros: str | None = None  # "50 %", or "2:4"
    calibration: int | None = None  # windows
    loss: float | None = None  # mean difference to the tool's own float model, nats per token
    standard_error: float | None = None
    perplexity: float | None = None

    @property
    def size(self) -> Size:
        return Size(math.floor(self.bits), self.activations, self.zeros)

    def above(self, reference: Record) -> float:
        """How far it is above the float model, in nats per token."""
        if self.loss is not None:
            return self.loss
        assert self.perplexity is not None
        return math.log(self.perplexity) - reference["metrics"]["perplexity"]["loss"]


def read_peers(folder: Path) -> tuple[Peer, ...]:
    """Raises UserError for the first row that is not as `Peer`; no file, no peers."""
    path = folder / FILE
    if not path.exists():
        return ()
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    peers = tuple(strict(Peer, row, f"papers/{FILE}[{n}]") for n, row in enumerate(rows))
    for peer in peers:
        if (peer.loss is None) == (peer.perplexity is None):
            raise UserError(f"papers/{FILE}: {peer.method} needs either loss or perplexity.")
    return peers


def size(record: Record) -> Size:
    """What a compressed record is to be compared with."""
    activations, zeros = record["config"].get("activations"), _zeros(record["config"])
    bits = math.floor(bits_per_weight(record) or 0)
    if zeros and not record["config"]["algorithm"].get("format"):
        bits = DENSE  # the bits that say where the zeros are left out
    return Size(bits, element_bits(activations["format"]) if activations else None, zeros)


def _zeros(config: Mapping[str, Any]) -> str | None:
    node = config.get("algorithm") or {}
    if config.get("pruning") or "sparsity" not in node:
        return None
    if node.get("block"):
        return f"{node['keep']}:{node['block']}"
    return f"{100 * node['sparsity']:g} %"
