"""Slow NumPy float64 ports, the oracles of test_features.py.

`tinybert`: github.com/huawei-noah/Pretrained-Language-Model at commit 1bb9b3e (Apache-2.0), the
step of TinyBERT/general_distill.py; the student's states come projected, as from its `fit_dense`.
`minilm`: github.com/bloomberg/minilmv2.bb at commit 0d78e20 (Apache-2.0), `MiniLM.forward` in
minilmv2/minilmv2.py. The authors' own repository has no code of the distillation.
`hint`: github.com/adri-romsor/FitNets at commit 5c94a94 (no licence is stated), `expr` of
costs/TeacherHintRegressionCost.py, of a hint layer that is neither tanh nor sigmoid.
"""

import numpy as np

from tests.algorithms.distillation.divergences_official import log_softmax


def hint(student: np.ndarray, teacher: np.ndarray) -> float:
    return (0.5 * (teacher - student) ** 2).sum(1).mean()


def tinybert(student_reps, teacher_reps, student_atts, teacher_atts) -> tuple[float, float]:
    """The losses of hidden states, embeddings first, and of scores; the teacher's of all layers."""
    per_block = len(teacher_atts) // len(student_atts)
    att_loss = rep_loss = 0.0
    for i, att in enumerate(student_atts):
        chosen = teacher_atts[i * per_block + per_block - 1]
        att, chosen = (np.where(a <= -1e2, 0.0, a) for a in (att, chosen))
        att_loss += ((att - chosen) ** 2).mean()
    for i, rep in enumerate(student_reps):
        rep_loss += ((rep - teacher_reps[i * per_block]) ** 2).mean()
    return rep_loss, att_loss


def minilm(student, teacher, lengths, *, relations, heads: int) -> float:
    """student, teacher: q, k and v [B, T, width] each; relations: {(m, n): weight}, from 1."""

    def scaled(vectors, m, n):
        x, y = (
            v.reshape(*v.shape[:2], heads, -1).transpose(0, 2, 1, 3)
            for v in (vectors[m - 1], vectors[n - 1])
        )
        return x @ y.transpose(0, 1, 3, 2) / np.sqrt(x.shape[-1])

    total = 0.0
    for (m, n), weight in relations.items():
        rel_t, rel_s = scaled(teacher, m, n), scaled(student, m, n)
        loss = 0.0
        for b, length in enumerate(lengths):
            log_p = log_softmax(rel_t[b, :, :length, :length])
            log_q = log_softmax(rel_s[b, :, :length, :length])
            loss += (np.exp(log_p) * (log_p - log_q)).sum() / (heads * length)
        total += weight * loss / len(lengths)
    return total
