"""Small random models of every decoder family, made and saved by transformers itself.

Runs in the peers' environment. Shapes are awkward on purpose, norm scales and biases are random
and attention is far from uniform, so that a swapped convention moves the logits.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model to make, and what of it is special."""

    covers: str
    config: transformers.PretrainedConfig
    tokens: tuple[int, int]  # windows, tokens in each
    dtype: torch.dtype = torch.float32  # of the stored weights
    shard: str = "1GB"  # largest file
    rewrite: Callable[[dict], dict] = lambda config: config  # of config.json, once saved
    auto: type = transformers.AutoModelForCausalLM


def older(**extra) -> Callable[[dict], dict]:
    """Rewrites config.json to the form of transformers 4, which most published models have.

    There the rotation is `rope_theta` beside `rope_scaling`, the type is `torch_dtype`, and
    windows are not listed layer by layer.
    """

    def rewrite(config: dict) -> dict:
        config = {k: v for k, v in config.items() if k != "layer_types"}
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        return config | extra

    return rewrite


def families() -> dict[str, Family]:
    """Every golden model by name."""
    return {
        "llama_llama3_rope": Family(
            covers="llama3 rope scaling; 3 heads of 10 on 42 channels; more tokens than one block",
            config=transformers.LlamaConfig(
                **shape(hidden=42, ffn=59, layers=3, heads=3, kv=1, vocabulary=131),
                head_dim=10,
                rms_norm_eps=1e-2,
                rope_parameters={
                    "rope_type": "llama3",
                    "rope_theta": 10000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                tie_word_embeddings=False,
            ),
            tokens=(2, 139),
        ),
        "llama_linear_rope": Family(
            covers="linear rope scaling, every bias, tied, sharded, older config",
            config=transformers.LlamaConfig(
                **shape(hidden=40, ffn=52, layers=2, heads=5, kv=5, vocabulary=97),
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5},
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=True,
            ),
            tokens=(2, 23),
            shard="30KB",
            rewrite=older(),
        ),
        "smollm2": Family(
            covers="SmolLM2: nine heads in three groups, tied, bfloat16, older config",
            config=transformers.LlamaConfig(
                **shape(hidden=54, ffn=70, layers=3, heads=9, kv=3, vocabulary=113),
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
                tie_word_embeddings=True,
            ),
            tokens=(2, 25),
            dtype=torch.bfloat16,
            rewrite=older(rope_interleaved=False),
        ),
        "mistral": Family(
            covers="a sliding window of 5 in every layer; more tokens than one block; sharded",
            config=transformers.MistralConfig(
                **shape(hidden=44, ffn=61, layers=2, heads=6, kv=2, vocabulary=67),
                head_dim=14,
                rms_norm_eps=1e-2,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                sliding_window=5,
                tie_word_embeddings=False,
            ),
            tokens=(2, 141),
            shard="40KB",
        ),
        "qwen2": Family(
            covers="biases on q, k and v alone, tied; a window that is declared but not used",
            config=transformers.Qwen2Config(
                **shape(hidden=36, ffn=50, layers=2, heads=6, kv=2, vocabulary=103),
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                tie_word_embeddings=True,
            ),
            tokens=(2, 27),
            rewrite=older(sliding_window=3, use_sliding_window=False),
        ),
        "qwen2_windows": Family(
            covers="a full layer below two with a sliding window of 7, named by max_window_layers",
            config=transformers.Qwen2Config(
                **shape(hidden=30, ffn=47, layers=3, heads=5, kv=1, vocabulary=101),
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                use_sliding_window=True,
                sliding_window=7,
                max_window_layers=1,
                tie_word_embeddings=False,
            ),
            tokens=(2, 29),
            rewrite=older(),
        ),
        "qwen3": Family(
            covers="q and k norms, five heads of 14 on 38 channels, tied, bfloat16",
            config=transformers.Qwen3Config(
                **shape(hidden=38, ffn=53, layers=3, heads=5, kv=1, vocabulary=109),
                head_dim=14,
                rms_norm_eps=1e-2,
                rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
                tie_word_embeddings=True,
            ),
            tokens=(2, 31),
            dtype=torch.bfloat16,
        ),
        "qwen3_windows": Family(
            covers="layer types listed in the config, windows in the second layer only",
            config=transformers.Qwen3Config(
                **shape(hidden=32, ffn=45, layers=3, heads=3, kv=3, vocabulary=89),
                head_dim=10,
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
                use_sliding_window=True,
                sliding_window=6,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
                tie_word_embeddings=False,
            ),
            tokens=(2, 33),
        ),
        "smollm3": Family(
            covers="a third layer without positions, tied",
            config=transformers.SmolLM3Config(
                **shape(hidden=36, ffn=49, layers=4, heads=6, kv=2, vocabulary=83),
                pad_token_id=None,
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
                no_rope_layer_interval=3,
            ),
            tokens=(2, 21),
        ),
        "granite": Family(
            covers="multipliers of embedding, attention, residual and logits; biases, tied",
            config=transformers.GraniteConfig(
                **shape(hidden=40, ffn=51, layers=3, heads=5, kv=1, vocabulary=79),
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                embedding_multiplier=3.0,
                attention_multiplier=0.31,
                residual_multiplier=0.6,
                logits_scaling=2.5,
                attention_bias=True,
                mlp_bias=True,
                tie_word_embeddings=True,
            ),
            tokens=(2, 22),
        ),
        "gemma2": Family(
            covers="soft caps, norms around, windows of 7 that alternate, heads of 14 on 36, older",
            config=transformers.Gemma2Config(
                **shape(hidden=36, ffn=47, layers=4, heads=4, kv=2, vocabulary=91),
                pad_token_id=None,
                head_dim=14,
                rms_norm_eps=1e-3,
                query_pre_attn_scalar=20,
                sliding_window=7,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            ),
            tokens=(2, 139),
            dtype=torch.bfloat16,
            rewrite=older(),
        ),
        "gemma3": Family(
            covers="two bases of positions, one scaled; q and k norms; two of three layers slide",
            config=transformers.Gemma3TextConfig(
                **shape(hidden=36, ffn=47, layers=4, heads=6, kv=3, vocabulary=91),
                pad_token_id=None,
                head_dim=10,
                rms_norm_eps=1e-3,
                query_pre_attn_scalar=12,
                sliding_window=6,
                layer_types=[
                    "sliding_attention",
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                ],
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {
                        "rope_type": "linear",
                        "rope_theta": 5000.0,
                        "factor": 4.0,
                    },
                },
            ),
            tokens=(2, 26),
        ),
        "phi3": Family(
            covers="LongRoPE beyond the original context of 16, q k v and gate up in one, a window",
            config=transformers.Phi3Config(
                **shape(hidden=40, ffn=46, layers=2, heads=5, kv=1, vocabulary=73),
                pad_token_id=None,
                rms_norm_eps=1e-3,
                original_max_position_embeddings=16,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 16,
                    "short_factor": [1.0, 1.1, 1.25, 1.5],
                    "long_factor": [1.5, 2.0, 3.0, 4.5],
                },
                sliding_window=11,
            ),
            tokens=(2, 25),
        ),
        "phi4_mini": Family(
            covers="half of each head turned, LongRoPE within the original context, tied",
            config=transformers.Phi3Config(
                **shape(hidden=48, ffn=46, layers=2, heads=4, kv=2, vocabulary=73),
                pad_token_id=None,
                rms_norm_eps=1e-5,
                original_max_position_embeddings=64,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "partial_rotary_factor": 0.5,
                    "original_max_position_embeddings": 64,
                    "short_factor": [1.0, 1.2, 1.7],
                    "long_factor": [1.5, 2.0, 3.0],
                },
                tie_word_embeddings=True,
            ),
            tokens=(2, 24),
        ),
        "opt": Family(
            covers="learned positions with two unused rows, LayerNorm, ReLU, biases, tied",
            config=transformers.OPTConfig(
                vocab_size=71,
                hidden_size=30,
                num_hidden_layers=3,
                ffn_dim=44,
                num_attention_heads=6,
                max_position_embeddings=40,
                word_embed_proj_dim=30,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            ),
            tokens=(2, 37),
            dtype=torch.float16,
        ),
        "gpt2": Family(
            covers="matrices as [in, out], q k v in one, odd heads, learned positions, tied",
            config=transformers.GPT2Config(
                vocab_size=71,
                n_positions=48,
                n_embd=35,
                n_layer=3,
                n_head=5,
                n_inner=58,
                layer_norm_epsilon=1e-3,
                bos_token_id=None,
                eos_token_id=None,
            ),
            tokens=(2, 41),
        ),
        "mixtral": Family(
            covers="two of five experts, a window, sharded",
            config=transformers.MixtralConfig(
                **shape(hidden=32, ffn=19, layers=2, heads=4, kv=2, vocabulary=61),
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                num_local_experts=5,
                num_experts_per_tok=2,
                sliding_window=9,
            ),
            tokens=(2, 23),
            shard="40KB",
        ),
        "qwen2_moe": Family(
            covers="a shared expert with a gate beside two of three; a first layer without; biases",
            config=transformers.Qwen2MoeConfig(
                **shape(hidden=28, ffn=31, layers=2, heads=2, kv=1, vocabulary=61),
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                num_experts=3,
                num_experts_per_tok=2,
                moe_intermediate_size=17,
                shared_expert_intermediate_size=21,
                mlp_only_layers=[0],
            ),
            tokens=(2, 19),
        ),
        "qwen3_moe": Family(
            covers="three of seven experts whose weights sum to one, in every second layer",
            config=transformers.Qwen3MoeConfig(
                **shape(hidden=24, ffn=29, layers=2, heads=3, kv=1, vocabulary=61),
                head_dim=10,
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                num_experts=7,
                num_experts_per_tok=3,
                moe_intermediate_size=15,
                norm_topk_prob=True,
                decoder_sparse_step=2,
            ),
            tokens=(2, 21),
            dtype=torch.bfloat16,
        ),
        "olmoe": Family(
            covers="two of six experts, weights as they are; norms over whole q and k; a clip",
            config=transformers.OlmoeConfig(
                **shape(hidden=24, ffn=13, layers=2, heads=2, kv=2, vocabulary=61),
                pad_token_id=None,
                rms_norm_eps=1e-3,
                rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
                num_experts=6,
                num_experts_per_tok=2,
                clip_qkv=0.8,
            ),
            tokens=(2, 20),
        ),
        "bert": Family(
            covers="an encoder: norms behind sums, kinds of tokens, no mask; last activations",
            config=transformers.BertConfig(
                vocab_size=61,
                hidden_size=36,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=47,
                max_position_embeddings=30,
                type_vocab_size=2,
                layer_norm_eps=1e-3,
            ),
            tokens=(2, 27),
            auto=transformers.AutoModel,
        ),
    }


def shape(*, hidden: int, ffn: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict:
    """The options that all families share, by transformers' names."""
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def save(family: Family, folder: Path, rng: np.random.Generator) -> None:
    """Write config.json, safetensors and expected.npz (tokens, logits) of a random model."""
    model = family.auto.from_config(
        family.config, attn_implementation="eager", experts_implementation="eager"
    )
    randomize(model, rng)
    cast(model, family.dtype).save_pretrained(folder, max_shard_size=family.shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = family.rewrite(json.loads(path.read_text()))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokens = rng.integers(0, family.config.vocab_size, family.tokens)
    expected = logits(read(folder, family.auto), tokens)
    difference = abs(expected - logits(cast(model, torch.float32), tokens)).max()
    assert difference < 1e-5, f"{folder.name} reads back differently, by {difference}"
    np.savez_compressed(folder / "expected.npz", tokens=tokens.astype(np.int32), logits=expected)


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The same model with parameters of another type; `to` would round the rotation's buffer."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def read(folder: Path, auto: type) -> torch.nn.Module:
    """The model as transformers finds it on disk, in float32."""
    return auto.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # grouped products want strides of 16 bytes
    )


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits [windows, tokens, vocabulary]; of an encoder, its last activations."""
    found = model.eval()(torch.from_numpy(tokens))
    return (found.logits if "logits" in found else found.last_hidden_state).numpy()


@torch.no_grad()
def randomize(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Fill every parameter from NumPy's generator, whose draws no processor changes."""
    for name, parameter in model.named_parameters():
        size = tuple(parameter.shape)
        if (
            len(size) == 1
            and ("norm" in name.lower() or ".ln_" in name)
            and name.endswith("weight")
        ):
            value = rng.uniform(0.5, 1.5, size)
        elif name.endswith("bias"):
            value = 0.3 * rng.standard_normal(size)
        elif "embed" in name:
            value = 0.3 * rng.standard_normal(size)
        else:
            value = 1.2 * rng.standard_normal(size) / size[1] ** 0.5
        parameter.copy_(torch.from_numpy(value))
