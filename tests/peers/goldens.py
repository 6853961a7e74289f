"""Golden folders, read in planish's own environment: what transformers computed, and ours."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import open_source
from models.decoder import Decoder

REPOSITORY = Path(__file__).parents[2]
COMMITTED = REPOSITORY / "tests" / "golden" / "decoder"
SMOLLM2 = REPOSITORY / "tests" / "golden" / "smollm2_135m.npz"  # by make_smollm2.py
EMBEDDED = REPOSITORY / "conf" / "model" / "smollm2_135m.yaml"
WINDOWS = REPOSITORY / "experiments" / "data" / "enwiki_windows.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Golden:
    """One folder, opened: our model, the tokens and transformers' logits on them."""

    model: Decoder
    tokens: jax.Array  # (B, T)
    logits: np.ndarray  # (B, T, V)


def names(folder: Path) -> tuple[str, ...]:
    """The models under a folder that make_goldens.py wrote."""
    return tuple(json.loads((folder / "manifest.json").read_text())["models"])


def load(folder: Path) -> Golden:
    """Open one golden folder."""
    with np.load(folder / "expected.npz") as expected:
        tokens, logits = jnp.asarray(expected["tokens"]), expected["logits"]
    return Golden(model=load_model(open_source(folder)), tokens=tokens, logits=logits)


@nnx.jit
def forward(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Logits (B, T, V) of the full forward pass."""
    return model(tokens)
