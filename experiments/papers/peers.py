"""What other tools reach on the same windows: papers/peers.yaml, by size."""

import dataclasses
import math
from pathlib import Path

import yaml

from experiments.errors import UserError
from experiments.papers.facts import strict
from experiments.report import Record, bits_per_weight
from experiments.step_labels import element_bits

FILE = "peers.yaml"
type Size = tuple[int, int | None]  # whole bits per weight, bits per activation (None: float)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One tool's result; its difference to the float model, or else its perplexity."""

    tool: str
    method: str
    bits: float  # per compressed weight
    windows: int  # held out
    activations: int | None = None  # bits
    calibration: int | None = None  # windows
    loss: float | None = None  # mean difference to the tool's own float model, nats per token
    standard_error: float | None = None
    perplexity: float | None = None

    @property
    def size(self) -> Size:
        return math.floor(self.bits), self.activations

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
    activations = record["config"].get("activations")
    return (
        math.floor(bits_per_weight(record) or 0),
        element_bits(activations["format"]) if activations else None,
    )
