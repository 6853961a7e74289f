"""Log-likelihoods of tokens after other tokens, streamed block by block like perplexity.

Requests are sorted by length and padded on the right, which a causal model does not see, to few
lengths: each is compiled once. All requests pass a block before the next one is read; where their
activations would take more than PORTION bytes, they go through the model in several portions.
Logits exist only where a token is scored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from experiments import progress
from experiments.checkpoints.sources import Source
from experiments.evaluation import logits
from experiments.evaluation.forward import activations
from models.config import DecoderConfig

PORTION = 1 << 28  # bytes of activations that are held while the blocks are read once
SHORTEST = 16  # tokens that anything is padded to


class Request(NamedTuple):
    """Tokens to score, each after all that come before it."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    loglikelihood: float  # of the continuation, in nats
    greedy: bool  # whether each of its tokens is the likeliest


class Batch(NamedTuple):
    """Requests that go through the model together, padded to one length."""

    rows: list[int]  # which requests
    tokens: Int[np.ndarray, "b T"]
    scored: list[tuple[int, int, int]]  # row in the batch, position before the token, the token


def score(source: Source, requests: Sequence[Request], *, batch: int) -> list[Score]:
    """Score every request; a context too long for the model loses its beginning.

    batch: tokens per step, padding included. A continuation must fit the model's context.
    """
    batches = batched(requests, source.config, batch)
    portions = in_portions(batches, source.config)
    total = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    with progress.steps("score", len(portions) * (source.config.layers + 1)) as step:
        for portion in portions:
            owners = [b.rows[row] for b in portion for row, _, _ in b.scored]
            found, likeliest = _score(source, portion, step)
            np.add.at(total, owners, found)
            np.logical_and.at(greedy, owners, likeliest)
            step("")
    return [Score(float(t), bool(g)) for t, g in zip(total, greedy, strict=True)]


def padded(length: int, longest: int) -> int:
    """The length that `length` tokens are padded to: 16, 24, 32, 48, 64, … up to `longest`."""
    step = SHORTEST
    while step < length:
        if step + step // 2 >= length:
            return min(step + step // 2, longest)
        step *= 2
    return min(step, longest)


def longest_of(config: DecoderConfig, length: int) -> int:
    """How far `length` tokens may be padded: LongRoPE turns by where a sequence ends."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope" and length <= scaling.original_context:
        return scaling.original_context
    return config.context


def batched(requests: Sequence[Request], config: DecoderConfig, size: int) -> list[Batch]:
    """Batches of equal shape for each padded length, the longest first; about `size` tokens each.

    The last token of a request is scored and never read, so one more than the model's context
    counts.
    """
    keep = config.context + 1
    tokens = [np.array([*r.context, *r.continuation][-keep:], np.int32) for r in requests]
    groups: dict[int, list[int]] = {}
    for n in sorted(range(len(requests)), key=lambda n: -len(tokens[n])):
        read = len(tokens[n]) - 1
        groups.setdefault(padded(read, longest_of(config, read)), []).append(n)
    found = []
    for length, members in groups.items():
        rows = min(max(1, size // length), len(members))
        for start in range(0, len(members), rows):
            mine = members[start : start + rows]
            table, scored = np.zeros((rows, length), np.int32), []
            for row, n in enumerate(mine):
                end, count = len(tokens[n]) - 1, len(requests[n].continuation)
                table[row, :end] = tokens[n][:-1]
                scored += [(row, at, int(tokens[n][at + 1])) for at in range(end - count, end)]
            found.append(Batch(mine, table, scored))
    return found


def in_portions(batches: Sequence[Batch], config: DecoderConfig) -> list[list[Batch]]:
    """The batches in order, in groups of one at least, whose activations take PORTION at most."""
    portions: list[list[Batch]] = []
    room = 0
    for each in batches:
        needed = 4 * each.tokens.size * config.hidden
        if not portions or needed > room:
            portions.append([])
            room = PORTION
        portions[-1].append(each)
        room -= needed
    return portions


def _score(
    source: Source, batches: Sequence[Batch], step: progress.Step
) -> tuple[Float[np.ndarray, " S"], np.ndarray]:
    """Of every scored token of the batches, in their order."""
    found = activations(source, [b.tokens for b in batches], step=step)
    states, tokens = [], []
    for n, each in enumerate(batches):
        row, at, token = np.array(each.scored, np.int32).reshape(-1, 3).T
        states.append(_rows(found[n], row, at))
        tokens.append(token)
        found[n] = found[n][:0]  # freed: only what is scored is kept
    x, ids = np.concatenate(states), np.concatenate(tokens)
    starts = range(0, len(x), logits.LOGITS)
    parts = [_full(x[n : n + logits.LOGITS], ids[n : n + logits.LOGITS]) for n in starts]
    seen = logits.following(source, *zip(*parts, strict=True))
    loss, greedy = (np.concatenate([np.asarray(p) for p in each])[: len(x)]
                    for each in ([s.loss for s in seen], [s.greedy for s in seen]))  # fmt: skip
    return -loss.astype(np.float64), greedy


def _rows(
    x: Float[Array, "b T D"], row: Int[np.ndarray, " S"], at: Int[np.ndarray, " S"]
) -> Float[np.ndarray, "S D"]:
    return np.asarray(x)[row, at]


def _full(
    x: Float[np.ndarray, "s D"], tokens: Int[np.ndarray, " s"]
) -> tuple[Float[Array, "S D"], Int[Array, " S"]]:
    """Filled up to LOGITS rows, so that one program serves all."""
    missing = logits.LOGITS - len(x)
    return jnp.asarray(np.pad(x, ((0, missing), (0, 0)))), jnp.asarray(np.pad(tokens, (0, missing)))
