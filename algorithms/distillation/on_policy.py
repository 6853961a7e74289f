"""What a student is trained to minimize on texts that it writes itself, as training goes.

A window's first `prompt` tokens are the prompt, and the rest is what the student writes, or what
the data go on with. Texts are sampled by the parameters of the step and used once, so importance
ratios between updates are one. Samples are not differentiated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key

from algorithms.decoding.sampling import Decode, generate
from algorithms.distillation.gkd import GKD, mixed
from algorithms.distillation.masking import Mask
from algorithms.distillation.minillm import MiniLLM, log_probabilities
from algorithms.distillation.objectives import require_teacher
from algorithms.objectives import between, cross_entropy, positions
from algorithms.training import Batch, Predictions, Sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyGKD:
    """GKD: with a probability, what the student writes; else what the data go on with.

    prompt: tokens of each window that are given. temperature: of what is sampled.
    """

    gkd: GKD
    prompt: int = 16
    temperature: float | int = 1.0

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        require_teacher(teacher)
        windows = whole_windows(batch)
        require_prompt(self.prompt, windows.shape[1])
        if training:
            choice, sampling = jax.random.split(key)
            chosen = self.gkd.on_policy(choice, len(windows))
            windows = lax.cond(
                jnp.any(chosen),
                lambda: mixed(chosen, self._written(model, windows, sampling), windows),
                lambda: windows,
            )
        mask = behind_prompt(windows, self.prompt)
        mask = mask if batch.mask is None else mask & (jnp.asarray(batch.mask) > 0)
        student, taught = (each.predictions(windows[:, :-1]) for each in (model, teacher))
        apart = between(self.gkd.divergence, student, taught).reshape(mask.shape)
        losses = cross_entropy(student, windows[:, 1:].reshape(-1))[0].reshape(mask.shape)
        return over_sequences({"loss": apart, "cross_entropy": losses}, mask)

    def _written(self, model: Any, windows: Int[Array, "B T"], key: Any) -> Int[Array, "B T"]:
        own = unlearned(model)
        cache = own.empty_caches(*windows.shape)
        return written(own.decode, cache, windows, self.prompt, key, self.temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyMiniLLM:
    """MiniLLM on what a mixture of student and teacher writes, beside the data's cross-entropy.

    language: what that counts. Evaluated, it is the cross-entropy of the data.
    """

    minillm: MiniLLM
    prompt: int = 16
    temperature: float | int = 1.0
    language: float | int = 1.0

    def __call__(
        self, model: Any, teacher: Any, batch: Batch, key: Key[Array, ""], *, training: bool
    ) -> Sums:
        require_teacher(teacher)
        windows = whole_windows(batch)
        require_prompt(self.prompt, windows.shape[1])
        targets, weights = positions(batch)
        losses, _ = cross_entropy(model.predictions(windows[:, :-1]), targets)
        hard, count = jnp.sum(weights * losses), jnp.sum(weights)
        if not training:
            return Sums(hard, count, {"cross_entropy": hard})
        policy = self._policy(model, teacher, windows, key)
        return Sums(
            self.language * hard + policy * lax.stop_gradient(count), count,
            {"cross_entropy": hard, "policy": policy * count},
        )  # fmt: skip

    def _policy(
        self, model: Any, teacher: Any, windows: Int[Array, "B T"], key: Any
    ) -> Float[Array, ""]:
        own, rooms = unlearned(model), windows.shape
        decode = self.minillm.sampler(own.decode, teacher.decode)
        both = own.empty_caches(*rooms), teacher.empty_caches(*rooms)
        texts = written(decode, both, windows, self.prompt, key, self.temperature)
        mask, tokens = behind_prompt(texts, self.prompt), texts[:, 1:]

        def logits(predictions: Predictions) -> Float[Array, "B T V"]:
            return predictions.logits.reshape(*tokens.shape, -1)

        student, taught = (logits(each.predictions(texts[:, :-1])) for each in (model, teacher))
        known = (lax.stop_gradient(log_probabilities(x, tokens)) for x in (student, taught))
        return self.minillm.loss(student, taught, tokens, mask, self.minillm.score(*known, mask))


def whole_windows(batch: Batch) -> Int[Array, "B T"]:
    """Inputs, and the last target."""
    return jnp.concatenate([jnp.asarray(batch.inputs), jnp.asarray(batch.targets)[:, -1:]], 1)


def require_prompt(prompt: int, tokens: int) -> None:
    if not 0 < prompt < tokens:
        raise ValueError(f"prompt={prompt} must be from 1 to {tokens - 1}, of windows of {tokens}.")


def behind_prompt(windows: Int[Array, "B T"], prompt: int) -> Mask:
    """The positions whose targets are behind the prompt."""
    b, t = windows.shape
    return jnp.broadcast_to(jnp.arange(1, t) >= prompt, (b, t - 1))


def unlearned(model: nnx.Module) -> Any:
    """The same model, through which no gradient goes."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lax.stop_gradient, state))


def written(
    decode: Decode, cache: Any, windows: Int[Array, "B T"], prompt: int, key: Any,
    temperature: float | int,
) -> Int[Array, "B T"]:  # fmt: skip
    """The windows' prompts with what is sampled behind them."""
    given = windows[:, :prompt]
    count = jnp.full(len(windows), prompt)
    steps = windows.shape[1] - prompt
    found = generate(decode, cache, given, count, key, steps=steps, temperature=float(temperature))
    return jnp.concatenate([given, found.tokens.astype(given.dtype)], 1)


def over_sequences(values: dict[str, Float[Array, "B T"]], mask: Mask) -> Sums:
    """Each value's mean over the tokens of the mask; every sequence has as many."""
    weights = mask.astype(jnp.float32)
    totals = {name: jnp.sum(weights * x) for name, x in values.items()}
    return Sums(totals.pop("loss"), jnp.sum(weights), totals)
