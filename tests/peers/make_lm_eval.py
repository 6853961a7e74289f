"""A tiny random model and what lm-eval's Hugging Face backend makes of it:
`python make_lm_eval.py FOLDER [--seed N]` writes tests/golden/lm_eval, tasks/ apart.

Its tokenizer puts a bos in front, its context is short enough that texts are cut, and its weights
are large enough that its answers differ.
"""

import argparse
import json
from pathlib import Path

import tokenizers
import torch
import transformers
from run_lm_eval import evaluate
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TASKS = Path(__file__).parents[1] / "golden" / "lm_eval" / "tasks"
ASKED = [("choices", None), ("choices", 2), ("cut", None), ("rolling", None), ("answers", None)]
CONTEXT = 64
TEXT = ["the cat sat on the mat and the dog ran after the red ball in the green garden"] * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_model(arguments.folder, arguments.seed)
    expected = {
        name if shots is None else f"{name} with {shots}": evaluate(
            arguments.folder, [name], TASKS, num_fewshot=shots
        )[name]
        for name, shots in ASKED
    }
    text = json.dumps(expected, indent=1) + "\n"
    (arguments.folder / "expected.json").write_text(text)


def write_model(folder: Path, seed: int) -> None:
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.3, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)


def write_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(TEXT, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


if __name__ == "__main__":
    main()
