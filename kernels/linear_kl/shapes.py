"""Pairs of real language models that share a vocabulary, and the tokens of a step of training."""

import functools

import jax
import jax.numpy as jnp

from kernels.linear_cross_entropy.shapes import GIGABYTE
from kernels.linear_kl.api import bucket, linear_kl
from kernels.workload import Cost, Workload

SHAPES = {  # tokens, the student's width, the teacher's, vocabulary
    "Llama-3.2-1B from 3-8B": (8192, 2048, 4096, 128256),
    "Qwen2.5-0.5B from 7B": (4096, 896, 3584, 152064),
    "SmolLM2-135M from 360M": (4096, 576, 960, 49152),
}


def arguments(key, tokens, student, teacher, vocabulary, dtype=jnp.bfloat16):
    """Logits spread by 2."""

    def layer(key, width):
        of_h, of_w = jax.random.split(key)
        h = jax.random.normal(of_h, (tokens, width), dtype)
        w = jax.random.normal(of_w, (vocabulary, width), dtype) * (2 * width**-0.5)
        return h, w.astype(dtype)

    of_student, of_teacher = jax.random.split(key)
    return *layer(of_student, student), *layer(of_teacher, teacher)


def plain(h_s, w_s, h_t, w_t):
    """All logits at once, as XLA likes them: KL(teacher ‖ student)."""

    def log_softmax(h, w):
        logits = jnp.einsum("td,vd->tv", h, w, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits, axis=1)

    log_p, log_q = log_softmax(h_t, w_t), log_softmax(h_s, w_s)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=1)


def trained(divergence):
    """Its mean and the gradients of it, as a step of distillation takes them."""

    def run(h_s, w_s, h_t, w_t, **settings):
        def mean(h_s, w_s):
            return divergence(h_s, w_s, h_t, w_t, **settings).mean()

        return jax.value_and_grad(mean, (0, 1))(h_s, w_s)

    return run


def _workloads(name, tokens, student, teacher, vocabulary):
    sizes = {"tokens": tokens, "student": student, "teacher": teacher, "vocabulary": vocabulary}
    make = functools.partial(arguments, **sizes)
    both = 2 * tokens * vocabulary * (student + teacher)
    operands = 2 * (tokens + vocabulary) * (student + teacher)
    gradients = 2 * (tokens + vocabulary) * student
    for kind in ("forward", "jsd"):
        h_s, w_s, *_ = jax.eval_shape(make, jax.random.key(0))
        of = bucket(h_s, w_s, kind)
        # Backward computes the logits anew; jsd needs their log-sum-exps before it mixes them.
        products = (3 if kind == "jsd" else 2) * both + 4 * tokens * vocabulary * student
        yield f"{name}, {kind}", Workload(
            make, trained(functools.partial(linear_kl, kind=kind)),
            Cost(operands + gradients + 4 * tokens, products), of,
            trained(plain) if kind == "forward" else None, temporary=GIGABYTE,
        )  # fmt: skip


WORKLOADS = {
    key: workload for name, shape in SHAPES.items() for key, workload in _workloads(name, *shape)
}
