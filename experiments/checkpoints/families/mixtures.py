"""Mixtures of experts: Mixtral, Qwen2-MoE and Qwen3-MoE, OLMoE."""

from typing import Any

from experiments.checkpoints.families.base import LLAMA_BLOCK, Family, decoder_sizes, rotary
from experiments.checkpoints.families.llama import llama_config, llama_settings
from experiments.checkpoints.families.mistral import config as mistral_config
from experiments.checkpoints.families.mistral import settings as mistral_settings
from experiments.checkpoints.families.qwen import qwen2_config, qwen3_config
from experiments.checkpoints.families.qwen import settings as qwen_settings
from experiments.checkpoints.families.raw import Raw
from models.config import DecoderConfig, Mixing

ROUTER = LLAMA_BLOCK | {"mlp.router": "mlp.gate"}
SHARED = ROUTER | {
    "mlp.shared.gate": "mlp.shared_expert.gate_proj",
    "mlp.shared.up": "mlp.shared_expert.up_proj",
    "mlp.shared.down": "mlp.shared_expert.down_proj",
    "mlp.shared_gate": "mlp.shared_expert_gate",
}
EXPERTS = {
    "mlp.experts.gate": "mlp.experts.{}.gate_proj",
    "mlp.experts.up": "mlp.experts.{}.up_proj",
    "mlp.experts.down": "mlp.experts.{}.down_proj",
}


def mixtral_config(raw: Raw) -> dict[str, Any]:
    experts = Mixing(
        count=raw.count("num_local_experts", 8), chosen=raw.count("num_experts_per_tok", 2),
        feed_forward=raw.count("intermediate_size"), normalized=True,
    )  # fmt: skip
    window = raw.get("sliding_window")
    return {
        **mistral_config(raw), **rotary(raw, theta=1e6), "experts": experts,
        "windows": None if window is None else (window,) * raw.layers(),
    }  # fmt: skip


def _qwen_experts(raw: Raw, count: int, chosen: int, shared: int) -> Mixing:
    """In every layer whose number decoder_sparse_step divides, but for mlp_only_layers."""
    step, plain = raw.count("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    layers = [n for n in range(raw.layers())
              if n not in plain and (n + 1) % step == 0]  # fmt: skip
    return Mixing(
        count=raw.count("num_experts", raw.get("num_local_experts", count)),
        chosen=raw.count("num_experts_per_tok", chosen),
        feed_forward=raw.count("moe_intermediate_size"), shared=shared,
        normalized=bool(raw.get("norm_topk_prob", False)), layers=tuple(layers),
    )  # fmt: skip


def qwen2_moe_config(raw: Raw) -> dict[str, Any]:
    shared = raw.count("shared_expert_intermediate_size", 5632)
    return {
        **qwen2_config(raw),
        "qkv_bias": bool(raw.get("qkv_bias", True)),
        "experts": _qwen_experts(raw, 60, 4, shared),
    }


def qwen3_moe_config(raw: Raw) -> dict[str, Any]:
    return {**qwen3_config(raw), "experts": _qwen_experts(raw, 128, 8, 0)}


def olmoe_config(raw: Raw) -> dict[str, Any]:
    """q and k are normed over all heads at once."""
    experts = Mixing(
        count=raw.count("num_experts", 64), chosen=raw.count("num_experts_per_tok", 8),
        feed_forward=raw.count("intermediate_size"),
        normalized=bool(raw.get("norm_topk_prob", False)),
    )  # fmt: skip
    return {
        **llama_config(raw), "qk_norm": True, "qk_norm_whole": True,
        "qkv_clip": raw.get("clip_qkv"), "experts": experts,
    }  # fmt: skip


def _mixing(c: DecoderConfig) -> Mixing:
    assert c.experts is not None
    return c.experts


def mixtral_settings(c: DecoderConfig) -> dict[str, Any]:
    e = _mixing(c)
    return {
        **mistral_settings(c), "intermediate_size": e.feed_forward,
        "num_local_experts": e.count, "num_experts_per_tok": e.chosen,
    }  # fmt: skip


def qwen_moe_settings(c: DecoderConfig) -> dict[str, Any]:
    e = _mixing(c)
    shared = {"shared_expert_intermediate_size": e.shared} if e.shared else {}
    return {
        **qwen_settings(c), **shared,
        "num_experts": e.count, "num_experts_per_tok": e.chosen,
        "moe_intermediate_size": e.feed_forward, "norm_topk_prob": e.normalized,
        "mlp_only_layers": [n for n in range(c.layers) if not c.mixes(n)],
        "decoder_sparse_step": 1,
    }  # fmt: skip


def olmoe_settings(c: DecoderConfig) -> dict[str, Any]:
    e = _mixing(c)
    return {
        **llama_settings(c), "intermediate_size": e.feed_forward, "clip_qkv": c.qkv_clip,
        "num_experts": e.count, "num_experts_per_tok": e.chosen, "norm_topk_prob": e.normalized,
    }  # fmt: skip


def mixtral_sizes(raw: Raw) -> dict[str, Any]:
    return {**decoder_sizes(raw), "norm_epsilon": raw.number("rms_norm_eps", 1e-5)}


MIXTRAL = Family(
    name="mixtral", architecture="MixtralForCausalLM", config=mixtral_config, sizes=mixtral_sizes,
    settings=mixtral_settings,
    block=LLAMA_BLOCK | {"mlp.router": "block_sparse_moe.gate"},
    experts={
        "mlp.experts.gate": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.up": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.down": "block_sparse_moe.experts.{}.w2",
    },
)  # fmt: skip
QWEN2_MOE = Family(
    name="qwen2_moe", architecture="Qwen2MoeForCausalLM", config=qwen2_moe_config,
    settings=qwen_moe_settings, sizes=decoder_sizes, block=SHARED, experts=EXPERTS,
)  # fmt: skip
QWEN3_MOE = Family(
    name="qwen3_moe", architecture="Qwen3MoeForCausalLM", config=qwen3_moe_config,
    settings=qwen_moe_settings, sizes=decoder_sizes, block=ROUTER, experts=EXPERTS,
)  # fmt: skip
OLMOE = Family(
    name="olmoe", architecture="OlmoeForCausalLM", config=olmoe_config, sizes=mixtral_sizes,
    settings=olmoe_settings,
    block=ROUTER, experts=EXPERTS,
)  # fmt: skip
