"""A client of vLLM's OpenAI completions API with token ids in and out, so that no tokenizer is involved."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import ArealError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Answer:
    """One continuation of a prompt.

    Attributes:
        tokens: ids of the generated tokens.
        logprobs: log-probability of each token under the policy that generated it.
    """

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of an answer that one version of the weights made."""

    version: str
    tokens: list[int]


class Completions:
    """A client of the server at ``url``; ``engine`` is the DP rank that must answer (None: vLLM chooses one)."""

    def __init__(self, url: str, timeout: float = 120.0, adapter: str = "") -> None:
        """Ask the base model, or ``adapter``."""
        self._server = urlsplit(url).netloc
        self._timeout = timeout
        self._model = {"model": adapter} if adapter else {}

    def sample(
        self, prompts: Sequence[Sequence[int]], *, tokens: int, n: int = 1, engine: int | None = None
    ) -> list[list[Answer]]:
        """Sample ``n`` answers of ``tokens`` tokens to each prompt, at temperature 1."""
        # logprobs=0 asks for the log-probability of the chosen token only.
        choices = self._complete(prompts, tokens, engine, n=n, temperature=1.0, logprobs=0)
        answers = [Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]
        return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]

    def greedy(self, prompts: Sequence[Sequence[int]], *, tokens: int, engine: int | None = None) -> list[list[int]]:
        """Return the greedy continuation of each prompt."""
        choices = self._complete(prompts, tokens, engine, temperature=0.0)
        return [choice["token_ids"] for choice in choices]

    def spans(self, prompt: Sequence[int], *, tokens: int, engine: int | None = None) -> list[Span]:
        """Return the greedy answer by the weights that made it, as vLLM reports them (needs ``--enable-scale-out``)."""
        sampling = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
        body = {"token_ids": list(prompt), "sampling_params": sampling}
        choice = self._post("/inference/v1/generate", body, engine)["choices"][0]
        spans = choice["weight_versions"] or []
        return [Span(span["version"], choice["token_ids"][span["start"] : span["end"]]) for span in spans]

    def _complete(
        self, prompts: Sequence[Sequence[int]], tokens: int, engine: int | None, **sampling: Any
    ) -> list[dict[str, Any]]:
        body = {
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            **sampling,
        }
        choices: list[dict[str, Any]] = self._post("/v1/completions", body, engine)["choices"]
        return sorted(choices, key=lambda choice: choice["index"])

    def _post(self, path: str, body: dict[str, Any], engine: int | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if engine is not None:
            headers["X-data-parallel-rank"] = str(engine)
        with closing(http.client.HTTPConnection(self._server, timeout=self._timeout)) as connection:
            try:
                connection.request("POST", path, json.dumps(body | self._model), headers)
                response = connection.getresponse()
                text = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise ArealError(f"POST http://{self._server}{path} failed: {error!r}; see the engine's log") from error
        if response.status != http.HTTPStatus.OK:
            detail = text[:2000].decode(errors="replace")
            raise ArealError(f"POST http://{self._server}{path} failed: status {response.status}: {detail}")
        answer: dict[str, Any] = json.loads(text)
        return answer
