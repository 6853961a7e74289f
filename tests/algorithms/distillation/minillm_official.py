"""A slow NumPy float64 port of the official MiniLLM code, the oracle of test_minillm.py.

Source: github.com/microsoft/LMOps (MIT), minillm/minillm: `rewards` and `weights` are of
`PPOSampler.run_sample` in sampler.py at commit 19f288d, with `Reward.reward_fn` of reward.py at
7521acf; `advantages`, `pg_loss` and `reg_loss` of `Loss` in losses.py at 7b14bef; `whiten`,
`get_entropy`, `get_x_entropy` and `get_log_probs` of utils.py at 2553a9d, whitening as of its
distributed statistics. Temperature 1, no filtered logits, one process.
"""

import numpy as np


def log_softmax(x: np.ndarray) -> np.ndarray:
    return (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def get_log_probs(logits: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    found = np.take_along_axis(log_softmax(logits), ids[..., None], -1)[..., 0]
    return np.where(mask, found, 0)


def reward_fn(teacher: np.ndarray, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The teacher's log-probabilities, of centred logits that are 0 in padding."""
    logits = (teacher - teacher.mean(-1, keepdims=True)) * mask[..., None]
    selection = np.take_along_axis(logits, ids[..., None], -1)[..., 0]
    return selection - np.log(np.exp(logits).sum(-1)) * mask


def rewards(log_q, log_p, *, scaling: float, clip: float) -> np.ndarray:
    return np.clip((log_p - log_q) / scaling, -clip, clip)


def weights(log_q, log_p, alpha: float | None) -> np.ndarray:
    if alpha is None:
        return np.ones_like(log_q)
    mix = (1 - alpha) * np.exp(log_q) + alpha * np.exp(log_p)
    return np.exp(log_q - np.log(mix))


def advantages(reward: np.ndarray, mask: np.ndarray, gamma: float) -> np.ndarray:
    lens = np.cumsum(mask.astype(float), -1)
    lens = mask - lens + lens[:, -1:]
    lens = np.where(lens == 0, 1, lens)
    last, found = 0.0, []
    for t in reversed(range(reward.shape[1])):
        last = reward[:, t] + gamma * last
        found.append(last)
    returns = np.stack(found[::-1], 1) / lens
    mean = returns.sum() / returns.size
    variance = ((returns - mean) ** 2).sum() / returns.size
    return (returns - mean) / np.sqrt(variance + 1e-8)


def pg_loss(log_q, old_log_q, advantage, mask, w, *, cliprange: float) -> float:
    ratio = np.exp((log_q - old_log_q) * mask) * w
    first = -advantage * ratio
    second = -advantage * np.clip(ratio, 1 - cliprange, 1 + cliprange)
    return (np.maximum(first, second) * mask).sum() / mask.sum()


def reg_loss(student: np.ndarray, teacher: np.ndarray, mask: np.ndarray) -> float:
    q = np.exp(log_softmax(student))
    cross = -(q * log_softmax(teacher)).sum(-1) * mask
    own = -(q * log_softmax(student)).sum(-1) * mask
    return ((cross - own) * mask).sum() / mask.sum()
