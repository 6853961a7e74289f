"""A planish model as lm-eval asks models: log-likelihoods, rolling ones, generation.

It reads texts as lm-eval's own Hugging Face backend does, so that both give the same numbers:
texts that spell special tokens mean them; bos goes in front where the model's tokenizer adds one,
unless it is there already; a context and its continuation are encoded together and then parted;
what is too long loses its beginning. It differs from that backend in that
1. log-probabilities are in float32 whatever the weights are in;
2. each prompt is continued with a random key of its own, whichever others go beside it;
3. a setting of generation that planish does not have is refused.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from experiments import progress
from experiments.checkpoints.loading import load_model
from experiments.checkpoints.sources import Source, require_predictions
from experiments.errors import UserError
from experiments.evaluation.scoring import Request, padded, score
from experiments.generation import Sampling, generate_together
from models.decoder import Decoder

NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}  # change nothing
SAMPLING = {"temperature": float, "top_k": int, "top_p": float}  # as YAML may have 1 for 1.0
MAX_TOKENS = 256  # of an answer whose task sets no limit, as lm-eval's backends have it


class PlanishLM(TemplateLM):
    """Any source as a model of lm-eval's; log-likelihoods need no more memory than perplexity."""

    def __init__(self, source: Source, *, batch: int, seed: int):
        """batch: tokens per step of scoring. seed: of sampled answers."""
        super().__init__()
        require_predictions(source.config, "tasks to do")
        self.source, self.batch, self.seed = source, batch, seed
        self.text = source.tokenizer()
        self.max_length = source.config.context
        self._decoder: Decoder | None = None  # loaded when something is generated

    @property
    def eot_token_id(self) -> int:
        if self.text.eos is None:
            raise UserError(f"The tokenizer of {self.source.location} names no end of text (eos).")
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text.bos is None else self.text.bos

    @property
    def tokenizer_name(self) -> str:
        return self.source.digest()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        ids = self.text.encode(string, special=True)
        there = string.startswith(self.text.decode([self.prefix_token_id], special=True))
        add = self.text.add_bos and not there if add_special_tokens is None else add_special_tokens
        return [self.text.bos, *ids] if add and self.text.bos is not None else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        try:
            text = self.text.conversation(chat_history, answer=add_generation_prompt)
        except UserError:  # many templates know no system: it is left out, as with transformers
            chat_history = [turn for turn in chat_history if turn["role"] != "system"]
            text = self.text.conversation(chat_history, answer=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()  # it goes on: no end of turn behind it
        return text[: text.rindex(last) + len(last)]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar is ours

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **more: Any
    ) -> list[tuple[float, bool]]:
        for spelled, _, ids in requests:
            if not 0 < len(ids) <= self.max_length:
                raise UserError(
                    f"A task asks for the likelihood of {len(ids)} tokens ({spelled[1][:40]!r}), "
                    f"and the model takes 1 to {self.max_length} at a time: leave that task out."
                )
        found = score(self.source, [Request(c, k) for _, c, k in requests], batch=self.batch)
        return [(each.loglikelihood, each.greedy) for each in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Each text after the model's bos, in consecutive windows as long as its context."""
        windows: list[Request] = []
        owners: list[int] = []
        for n, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                self.tok_encode(str(request.args[0])),
                self.prefix_token_id,
                self.max_length,
                context_len=1,
            )
            mine = [Request(*utils.make_disjoint_window(pair)) for pair in pairs]
            windows += mine
            owners += [n] * len(mine)
        totals = [0.0] * len(requests)
        found = score(self.source, windows, batch=self.batch)
        for n, each in zip(owners, found, strict=True):
            totals[n] += each.loglikelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        if self._decoder is None:
            self._decoder = load_model(self.source)
        keys = jax.random.split(jax.random.key(self.seed), len(requests))
        answers = [""] * len(requests)
        wanted = [self._wanted(request.args[1]) for request in requests]
        prompts = [
            self.tok_encode(request.args[0])[-(self.max_length - each.most) :]
            for request, each in zip(requests, wanted, strict=True)
        ]
        with progress.steps("generate", len(requests)) as step:
            for rows in self._together(prompts, wanted):
                found = self._answers(
                    [prompts[n] for n in rows], wanted[rows[0]], keys[np.array(rows)]
                )
                for n, answer in zip(rows, found, strict=True):
                    answers[n] = answer
                    step("")
        return answers

    def _wanted(self, settings: dict[str, Any]) -> "Wanted":
        """Raises UserError for what planish does not do."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_TOKENS))
        end = self.text.decode([self.eot_token_id], special=True)
        stops = handle_stop_sequences(wanted.pop("until"), eos=end)
        count, sampling = wanted.pop("max_gen_toks"), sampling_of(wanted)
        if count >= self.max_length:
            raise UserError(
                f"A task asks for {count} tokens at most, and the model's context of "
                f"{self.max_length} leaves no room for its prompt: leave that task out."
            )
        return Wanted(tuple(stops), count, sampling)

    def _together(self, prompts: list[list[int]], wanted: list["Wanted"]) -> Iterator[list[int]]:
        """Which prompts are continued at once: those that want the same, of about one length, as
        many as have places for `batch` tokens.
        """
        # The longest first: what is left to do takes less than what is done.
        order = sorted(range(len(prompts)), key=lambda n: (str(wanted[n]), -len(prompts[n])))
        for each, group in itertools.groupby(order, key=lambda n: wanted[n]):
            left = list(group)
            while left:
                longest = padded(len(prompts[left[0]]) + each.most, self.max_length)
                rows = max(1, self.batch // longest)
                yield left[:rows]
                del left[:rows]

    def _answers(self, prompts: list[list[int]], wanted: "Wanted", keys: jax.Array) -> list[str]:
        """What follows each prompt up to the first of the task's stops, which is left out."""
        assert self._decoder is not None
        answers: list[list[int]] = [[] for _ in prompts]
        open_ = set(range(len(prompts)))
        steps = generate_together(
            self._decoder, prompts, max_tokens=wanted.most, sampling=wanted.sampling, keys=keys
        )
        for tokens in steps:
            for n in sorted(open_):
                if int(tokens[n]) in self.text.stops:
                    open_.remove(n)
                    continue
                answers[n].append(int(tokens[n]))
                text = self.text.decode(answers[n])
                if any(stop in text for stop in wanted.stops):
                    open_.remove(n)
            if not open_:
                break
        return [
            postprocess_generated_text(self.text.decode(ids), list(wanted.stops), None)
            for ids in answers
        ]


class Wanted(NamedTuple):
    """How a task wants its answers."""

    stops: tuple[str, ...]
    most: int  # tokens of an answer
    sampling: Sampling


def sampling_of(wanted: dict[str, Any]) -> Sampling:
    """How a task wants its tokens chosen; raises UserError for settings that planish lacks."""
    unknown = {
        key: value
        for key, value in wanted.items()
        if key not in ("do_sample", *SAMPLING) and NEUTRAL.get(key) != value
    }
    if unknown:
        named = ", ".join(f"{key}={value}" for key, value in unknown.items())
        raise UserError(
            f"A task asks to generate with {named}, which planish does not do: it has do_sample, "
            f"{', '.join(SAMPLING)} and the stops and length of an answer."
        )
    if not wanted["do_sample"]:
        return Sampling()
    said = {key: kind(wanted[key]) for key, kind in SAMPLING.items() if wanted.get(key) is not None}
    return Sampling(**said)
