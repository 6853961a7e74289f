"""MiniLLM. Gu, Dong, Wei, Huang, Knowledge Distillation of Large Language Models, ICLR 2024,
arXiv:2306.08543.

Reverse KL of whole sequences, KL(q ‖ p), q the student and p the teacher, by policy gradients. For
tokens y_t sampled from q̃ = (1 - α) q + α p (teacher-mixed sampling, Sec. 2.2):

    r_t = clip((log p(y_t) - log q(y_t)) / σ),   R_t = Σ_{t' ≥ t} γ^(t' - t) r_t'
    A_t = whitened R_t / (tokens from t on)      (length normalization)
    w_t = q(y_t) / q̃(y_t),   ρ_t = w_t q_now(y_t) / q(y_t)
    loss = mean_t max(-A_t ρ_t, -A_t clip(ρ_t, 1 ± ε)) + mean_t KL(q_now(· | y_<t) ‖ p(· | y_<t))

the second part being the expectation over y_t of what the first has of a single step, taken exactly
(single-step decomposition). With γ = 1, no clipping, whitening or normalization, σ = 1, α = 0 and
R_{t+1} in the place of R_t the slope is that of KL(q ‖ p) (Eqs. 3, 4).

w_t of its own token alone is the paper's approximation of the product over all up to it. This
follows the official code, which differs from the paper in: 1. R_t has r_t in it beside the second
part. 2. γ = 0.95. 3. Rewards over σ = 0.5, clipped. 4. Whitening, over padding too. It differs from
the code in: 5. The loss on pretraining data, added to this one, is the caller's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from algorithms.decoding.sampling import Decode
from algorithms.distillation.divergences import reverse_kl
from algorithms.distillation.masking import masked_mean
from algorithms.numerics import widened
from kernels.linear_kl import reference


class Rollout(NamedTuple):
    """What is known of sampled tokens before the updates that use them."""

    log_q: Float[Array, "B T"]  # of the student that sampled
    rewards: Float[Array, "B T"]
    weights: Float[Array, "B T"]


class MiniLLM(NamedTuple):
    sampler: Callable[[Decode, Decode], Decode]  # of the student's and the teacher's, over (…, …)
    score: Callable[..., Rollout]  # of (log_q, log_p, mask) of the sampled tokens [B T]
    loss: Callable[..., Float[Array, ""]]  # of (student's, teacher's logits, tokens, mask, Rollout)


def minillm(
    *,
    teacher_share: float = 0.2,
    reward_scale: float = 0.5,
    reward_clip: float = 100.0,
    discount: float = 0.95,
    ratio_clip: float = 0.2,
    single_step: bool = True,
) -> MiniLLM:
    """teacher_share: α; reward_scale: σ; discount: γ; ratio_clip: ε. Defaults are the official
    script's for GPT-2.
    """
    if not 0 <= teacher_share < 1:
        raise ValueError(f"teacher_share={teacher_share} must be at least 0 and below 1.")
    for name, value in (("reward_scale", reward_scale), ("reward_clip", reward_clip),
                        ("ratio_clip", ratio_clip)):  # fmt: skip
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive.")
    if not 0 <= discount <= 1:
        raise ValueError(f"discount={discount} must be from 0 to 1.")

    def score(
        log_q: Float[Array, "B T"], log_p: Float[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Rollout:
        log_q, log_p = (jnp.where(mask, x, 0) for x in (log_q, log_p))
        reward = jnp.clip((log_p - log_q) / reward_scale, -reward_clip, reward_clip)
        return Rollout(log_q, reward, importance_weights(log_q, log_p, teacher_share))

    def loss(
        student: Float[Array, "B T V"],
        teacher: Float[Array, "B T V"],
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        rollout: Rollout,
    ) -> Float[Array, ""]:
        """student, teacher: logits at the positions that predict `tokens`."""
        log_q = log_probabilities(student, tokens)
        advantage = whiten(normalized_return(rollout.rewards, mask, discount))
        total = policy_loss(log_q, rollout, lax.stop_gradient(advantage), mask, ratio_clip)
        return total + reverse_kl()(student, teacher, mask) if single_step else total

    def sampler(student: Decode, teacher: Decode) -> Decode:
        return teacher_mixed(student, teacher, teacher_share)

    return MiniLLM(sampler, score, loss)


def teacher_mixed(student: Decode, teacher: Decode, share: float) -> Decode:
    """A decode function of the pair of their caches, whose softmax is (1 - α) q + α p."""

    def decode(
        tokens: Int[Array, "B T"], caches: tuple[Any, Any], count: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], tuple[Any, Any]]:
        logits_s, cache_s = student(tokens, caches[0], count)
        logits_t, cache_t = teacher(tokens, caches[1], count)
        log_q, log_p = (jax.nn.log_softmax(widened(x)) for x in (logits_s, logits_t))
        return reference.log_mixture(log_p, log_q, share), (cache_s, cache_t)

    return decode


def importance_weights(
    log_q: Float[Array, "*m"], log_p: Float[Array, "*m"], share: float
) -> Float[Array, "*m"]:
    """w = q / q̃, at most 1 / (1 - α)."""
    return jnp.exp(log_q - reference.log_mixture(log_p, log_q, share))


def reward_to_go(rewards: Float[Array, "B T"], discount: float) -> Float[Array, "B T"]:
    """R_t."""

    def step(later: Float[Array, " B"], reward: Float[Array, " B"]) -> Any:
        total = reward + discount * later
        return total, total

    return lax.scan(step, jnp.zeros_like(rewards[:, 0]), rewards.T, reverse=True)[1].T


def normalized_return(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], discount: float
) -> Float[Array, "B T"]:
    """R_t over the number of tokens from t on."""
    left = lax.cumsum(mask.astype(rewards.dtype), axis=1, reverse=True)
    return reward_to_go(rewards, discount) / jnp.maximum(left, 1)


def whiten(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Mean 0 and variance 1, over all entries."""
    return (x - x.mean()) * lax.rsqrt(x.var() + 1e-8)


def policy_loss(
    log_q: Float[Array, "B T"],
    rollout: Rollout,
    advantage: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    ratio_clip: float,
) -> Float[Array, ""]:
    """PPO's clipped loss, with importance weights. log_q: of the student that is trained."""
    ratio = jnp.exp(jnp.where(mask, log_q - rollout.log_q, 0)) * rollout.weights
    bounded = jnp.clip(ratio, 1 - ratio_clip, 1 + ratio_clip)
    return masked_mean(jnp.maximum(-advantage * ratio, -advantage * bounded), mask)


def log_probabilities(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    log_q = jax.nn.log_softmax(widened(logits))
    return jnp.take_along_axis(log_q, tokens[..., None], -1)[..., 0]
