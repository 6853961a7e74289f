"""Endpoints as models of lm-eval's: its own clients, less what they need transformers for.

lm-eval's clients score a text by its tokens, which they cut themselves with a tokenizer out of
transformers. A completions endpoint says where its tokens begin when it echoes a prompt, so that
texts are sent as they are here, and the tokens that begin at or reach beyond the end of the context
are the continuation's.
"""

import concurrent.futures
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import aiohttp
import requests
import tenacity
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import (
    LocalChatCompletion,
    LocalCompletionsAPI,
    OpenAIChatCompletion,
)
from lm_eval.models.utils import postprocess_generated_text

from experiments import progress
from experiments.endpoints import Endpoint
from experiments.errors import UserError

RETRIES = 3  # of an answer that did not come, or came with a server's error
OPENAI = "https://api.openai.com/"  # whose newer models name and refuse settings of their own


def connect(endpoint: Endpoint, *, seed: int) -> "Completions | Chat | OpenAIChat":
    """lm-eval's client of an endpoint. seed: sent with each request."""
    kind: Any = Completions
    if endpoint.chat:
        kind = OpenAIChat if endpoint.url.startswith(OPENAI) else Chat
    path = "chat/completions" if endpoint.chat else "completions"
    found = kind(
        model=endpoint.name, base_url=f"{endpoint.url.rstrip('/')}/{path}", tokenizer_backend=None,
        tokenized_requests=False, num_concurrent=endpoint.concurrent, timeout=endpoint.timeout,
        seed=seed, max_retries=RETRIES,
    )  # fmt: skip
    found.endpoint = endpoint
    return found


def server_facts(endpoint: Endpoint) -> dict[str, Any]:
    """What the server's list of models says of this one; nothing if it has no such list."""
    url = f"{endpoint.url.rstrip('/')}/models"
    with sentences(endpoint):
        answer = requests.get(url, headers=headers(endpoint), timeout=endpoint.timeout)
        if answer.status_code == requests.codes.not_found:
            return {}
        answer.raise_for_status()
        known = {each["id"]: each for each in answer.json()["data"]}
    said = known.get(endpoint.name, {})
    return {k: v for k, v in said.items() if isinstance(v, (str, int, float)) and k != "id"}


def headers(endpoint: Endpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}


@contextlib.contextmanager
def sentences(endpoint: Endpoint) -> Iterator[None]:
    """What can go wrong between here and a server, as a UserError."""
    url = endpoint.url
    try:
        yield
    except (requests.HTTPError, aiohttp.ClientResponseError) as error:
        raise _refused(endpoint, error) from error
    except (requests.RequestException, aiohttp.ClientError, TimeoutError) as error:
        # a decoding error is a RequestException too, of an answer that is no JSON
        what = "gives no JSON" if isinstance(error, ValueError) else "does not answer"
        raise UserError(
            f"{url} {what} ({_reason(error)}): check that the server runs, and model.url."
        ) from error
    except (LookupError, TypeError, AssertionError) as error:
        raise UserError(
            f"{url} answers otherwise than OpenAI's API does ({type(error).__name__}: {error}): "
            "check model.url and model.chat."
        ) from error


def _refused(endpoint: Endpoint, error: Any) -> UserError:
    response = getattr(error, "response", None)
    status = error.status if response is None else response.status_code
    if status in (requests.codes.unauthorized, requests.codes.forbidden):
        return UserError(
            f"{endpoint.url} refuses the key (HTTP {status}): put one that it takes into the "
            f"environment variable {endpoint.key_variable}."
        )
    said = "" if response is None else f": {' '.join(response.text.split())[:300]}"
    return UserError(
        f"{endpoint.url} answers HTTP {status}{said}; check model.url, model.name and what the "
        "tasks ask for."
    )


def _reason(error: BaseException) -> str:
    """The innermost of what requests wraps, without the objects' addresses."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return str(error) or type(error).__name__


class _Keyed:
    """What all of lm-eval's clients get: the key, errors as sentences, every stop of a task."""

    endpoint: Endpoint

    @property
    def api_key(self) -> str:
        return self.endpoint.key

    @property
    def header(self) -> dict[str, str]:
        return headers(self.endpoint)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Stops are looked for here too: a server takes four at most."""
        with sentences(self.endpoint):
            answers = super().generate_until(requests, disable_tqdm)  # type: ignore[misc]
        stops = [request.args[1].get("until") for request in requests]
        return [postprocess_generated_text(a, s, None) for a, s in zip(answers, stops, strict=True)]


class Chat(_Keyed, LocalChatCompletion):
    """Conversations in, answers out."""


class OpenAIChat(_Keyed, OpenAIChatCompletion):
    """The same of OpenAI itself."""


class Completions(_Keyed, LocalCompletionsAPI):
    """Texts in, continuations out, or the log-probabilities of what was sent."""

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        return self._scored([parted(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Each text in one request: it must fit the model's context."""
        return [found[0] for found in self._scored([("", *r.args) for r in requests])]

    def _scored(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        prefix, prompts = self.endpoint.prefix, []
        for context, continuation in pairs:
            context = context if context.startswith(prefix) else prefix + context
            if not context:
                raise UserError(
                    "A task scores texts that nothing is in front of: give model.prefix=…, the "
                    "model's bos as its tokenizer spells it."
                )
            prompts.append((context, continuation))
        with (
            progress.steps("ask", len(pairs)) as step,
            concurrent.futures.ThreadPoolExecutor(self.endpoint.concurrent) as pool,
        ):
            found = []
            for score in pool.map(lambda pair: self._score(*pair), prompts):
                found.append(score)
                step("")
        return found

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(RETRIES),
            wait=tenacity.wait_exponential(multiplier=0.5, min=1, max=10),
            retry=tenacity.retry_if_exception(_may_pass),
            reraise=True,
        )
        with sentences(self.endpoint):
            answer = retrying(self.model_call, [context + continuation], generate=False)
            said = answer["choices"][0]["logprobs"]
            if not said or not said.get("token_logprobs"):
                raise UserError(
                    f"{self.endpoint.url} gives no log-probabilities of a prompt's tokens (echo "
                    "with logprobs): choose tasks that generate, or a server that gives them."
                )
            return score_of(said, context, continuation, prefix=self.endpoint.prefix)


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help: nobody there yet, too many requests, a server's own error."""
    response = getattr(error, "response", None)
    if response is None:
        return isinstance(error, (requests.ConnectionError, requests.Timeout))
    return response.status_code == requests.codes.too_many_requests or response.status_code >= 500


def parted(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at the end of a context belong to the word behind them, as lm-eval has it."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def score_of(
    said: dict[str, Any], context: str, continuation: str, *, prefix: str = ""
) -> tuple[float, bool]:
    """The log-likelihood of the continuation's tokens, and whether each is the likeliest.

    said: `logprobs` of an answer that echoes context + continuation, perhaps with tokens behind.
    Raises UserError if one of those tokens has no log-probability, as a text's first one.
    """
    starts = token_starts(said, context + continuation, prefix)
    end = len(context) + len(continuation)
    if starts[-1] >= end and end not in starts:
        raise UserError(
            "The endpoint counts the characters of a text otherwise than it was sent, so that its "
            "tokens cannot be told apart: choose tasks that generate, or another server."
        )
    ends = [*starts[1:], end + 1]
    total, greedy = 0.0, True
    for n, (start, stop) in enumerate(zip(starts, ends, strict=True)):
        if start >= end or (start < len(context) and stop <= len(context)):
            continue
        if (value := said["token_logprobs"][n]) is None:
            raise UserError(
                "The endpoint gives no log-probability of the first token that a task scores: give "
                "model.prefix=…, the model's bos as its tokenizer spells it."
            )
        total += value
        greedy = greedy and value >= max((said["top_logprobs"][n] or {"": value}).values())
    return total, greedy


def token_starts(said: dict[str, Any], text: str, prefix: str) -> list[int]:
    """Where each token begins in the text that was sent.

    Servers count from what they show: some leave out a bos that was sent (the prefix), some show
    one that they added.
    """
    starts = said.get("text_offset")
    if not starts:
        starts = [0]
        for token in said["tokens"][:-1]:
            starts.append(starts[-1] + len(token))
    first, shift = said["tokens"][0].rstrip("\N{REPLACEMENT CHARACTER}"), 0
    if not text.startswith(first):
        shift = len(prefix) if prefix and text[len(prefix) :].startswith(first) else -len(first)
    return [start - starts[0] + shift for start in starts]
