"""The families of models that planish reads: one declaration each."""

from experiments.checkpoints.families.base import Family
from experiments.checkpoints.families.bert import BERT
from experiments.checkpoints.families.gemma import GEMMA2, GEMMA3
from experiments.checkpoints.families.gpt2 import GPT2
from experiments.checkpoints.families.llama import GRANITE, LLAMA, SMOLLM3
from experiments.checkpoints.families.mistral import MISTRAL
from experiments.checkpoints.families.mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from experiments.checkpoints.families.nemotron import NEMOTRON
from experiments.checkpoints.families.opt import OPT
from experiments.checkpoints.families.phi import PHI3
from experiments.checkpoints.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA, SMOLLM3, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GRANITE, OPT, GPT2,
        MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, BERT, NEMOTRON,
    )
}  # fmt: skip
