"""What a teacher's largest logits are worth: bytes a token and what is lost, against how many are
kept and how their values are.

What is lost is KL(p ‖ p̂) in nats, the mean over the positions of held-out windows: p what the
teacher says, p̂ what is decoded, with the mass of all that was left out spread evenly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from algorithms.distillation.compressed_logits import LogitCodec
from algorithms.distillation.top_k_logits import top_k_logits
from experiments import progress
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import Source
from experiments.entry import build
from experiments.papers.lookup import Run, compose


def teacher_logits(plain: dict[str, Any], source: Source) -> dict[str, Any]:
    """A row for each setting of the codec, the model being the teacher."""
    settings, vocabulary = plain["teacher_logits"], source.config.vocabulary
    data = build(compose(Run("compress", tuple(settings["data"]))), "data")
    windows = data.windows(source.tokenizer(), vocabulary, longest=source.config.context).heldout
    codecs = tuple(top_k_logits(**each) for each in settings["codecs"])
    graph, state = nnx.split(load_model(source))
    totals = np.zeros((len(codecs), 2))
    with progress.steps("windows", len(windows)) as tell:
        for window in windows:
            totals += np.array(_lost(state, window[None, :-1], graph=graph, codecs=codecs), float)
            tell("")
    positions = len(windows) * (windows.shape[1] - 1)
    rows = [
        {**each, "bytes_per_token": codec.bytes_per_token(vocabulary), "kl": kl, "kept": kept}
        for each, codec, (kl, kept) in zip(
            settings["codecs"], codecs, (totals / positions).tolist(), strict=True
        )
    ]
    return {"vocabulary": vocabulary, "positions": positions, "rows": rows}


@functools.partial(jax.jit, static_argnames=("graph", "codecs"))
def _lost(state: Any, tokens: Any, *, graph: Any, codecs: tuple[LogitCodec, ...]) -> Any:
    """Of each codec: KL(p ‖ p̂), and p's mass on what is kept, both summed over positions."""
    model: Any = nnx.merge(graph, state)
    log_p = jax.nn.log_softmax(model.predictions(tokens).logits.astype(jnp.float32))

    def one(codec: LogitCodec) -> tuple[Any, Any]:
        kept = codec.encode(log_p)
        log_q = jax.nn.log_softmax(codec.decode(kept, log_p.shape[-1]))
        left_out = jnp.exp(kept.rest + log_p.max(-1))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(), (1 - left_out).sum()

    return [one(codec) for codec in codecs]
