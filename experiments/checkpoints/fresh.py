"""A model that nobody has trained yet: random weights of a given shape, as a source like others.

Each tensor is drawn by itself, from the seed and its name, so that it is the same however and in
whichever order it is read. Initialized as GPT-2 is (Radford et al., 2019): normal with a standard
deviation of 0.02, in layers that write into the residual stream divided by √(2 · layers).
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from algorithms.mup import multipliers
from experiments.checkpoints.planish import decoder_config
from experiments.checkpoints.sources import Source, open_source, shapes
from experiments.data.tokenizer import Tokenizer
from experiments.errors import UserError
from models.config import DecoderConfig

RESIDUAL = (".attention.o.weight", ".down.weight")  # experts' too


class Fresh(Source):
    """conf/model names it as its `_target_`: sizes are those of `models.config.DecoderConfig`."""

    def __init__(
        self,
        *,
        tokenizer: str = "bytes",
        seed: int = 0,
        deviation: float = 0.02,
        mup: Mapping[str, int] | None = None,
        **sizes: Any,
    ):
        """tokenizer: "bytes", or the path of a model whose tokenizer is taken. mup: `hidden` and
        `head_size` of the base model; None: no muP.

        Raises UserError if the sizes make no model.
        """
        self._tokenizer, self._seed, self._deviation = tokenizer, seed, deviation
        self._matrices = 1.0  # the deviation of the blocks' matrices is times
        try:
            self.config = decoder_config(sizes)
            if mup is not None:
                self.config, self._matrices = _widened(self.config, **mup)
        except (TypeError, ValueError) as error:
            raise UserError(f"model: {error}") from error
        self.location = f"fresh-{self.config.family}"

    def names(self) -> frozenset[str]:
        return frozenset(shapes(self.config))

    def read(self, name: str) -> np.ndarray:
        shape = shapes(self.config)[name]
        if name.endswith(".bias"):
            return np.zeros(shape, np.float32)
        if len(shape) == 1:
            return np.ones(shape, np.float32)  # norms
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        deviation = self._deviation
        if name.endswith(RESIDUAL):
            deviation /= np.sqrt(2 * self.config.layers)
        if name.startswith("blocks."):
            deviation *= self._matrices
        return (deviation * rng.standard_normal(shape, np.float32)).astype(np.float32)

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer == "bytes":
            return byte_tokenizer()
        return open_source(self._tokenizer).tokenizer()

    def digest(self) -> str:
        """Of what it is drawn from: seed, shape and tokenizer."""
        drawn = {**dataclasses.asdict(self.config), "seed": self._seed,
                 "deviation": self._deviation, "tokenizer": self._tokenizer}  # fmt: skip
        if self._matrices != 1:
            drawn["matrices"] = self._matrices
        return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def _widened(config: DecoderConfig, *, hidden: int, head_size: int) -> tuple[DecoderConfig, float]:
    """The configuration with muP's multipliers, and that of its matrices' deviation."""
    if config.experts is not None:
        raise ValueError("mup: its table says nothing of the routers of experts: leave one out.")
    found = multipliers(config.hidden / hidden, config.head_size, head_size)
    scaled = dataclasses.replace(
        config, attention_scale=found.attention, logit_scale=config.logit_scale * found.logits
    )
    return scaled, found.deviation


def byte_tokenizer() -> Tokenizer:
    """Each byte of UTF-8 is a token: 256 of them, none special."""
    alphabet = _byte_alphabet()
    core = tokenizers.Tokenizer(models.BPE(vocab={c: b for b, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return Tokenizer(core=core)


def _byte_alphabet() -> list[str]:
    """The character by which byte-level tokenizers write each byte: its own where that prints."""
    characters = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(c for c in characters if ord(c) > 255))
    return [chr(b) if chr(b) in characters else next(others) for b in range(256)]
