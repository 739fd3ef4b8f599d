"""What the gateway asks of those who can answer, and what they tell it."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

Prompt = str | tuple[int, ...]
"""A text, or the ids of its tokens."""

Message = Mapping[str, Any]
"""`role`, `content` as text, and perhaps `name`: what a chat template reads."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token each time; frequency_penalty is taken off a token's logit once for each
    time that the answer has it, presence_penalty once; logit_bias: (token, what is added to its logit); seed: None is
    a new one each time."""

    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """Each of the prompts, or the one chat of `messages`, gets `choices` answers.

    max_tokens: None for as many as the context has room for; top_logprobs: how many alternatives to tell for each
    token, None for no log-probabilities at all.
    """

    prompts: tuple[Prompt, ...]
    messages: tuple[Message, ...] | None
    choices: int
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    top_logprobs: int | None

    @property
    def answers(self) -> int:
        return self.choices * (1 if self.messages is not None else len(self.prompts))


@dataclass(frozen=True)
class TokenScore:
    """A token of an answer: its text, its bytes where the text alone would not tell them, its log-probability by the
    model's own distribution, before any sampling option, and the likeliest alternatives."""

    text: str
    raw: bytes
    logprob: float
    alternatives: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """More of answer number `index`; `finish` is `stop` or `length` on its last piece."""

    index: int
    text: str
    tokens: tuple[TokenScore, ...] = ()
    finish: str | None = None


@dataclass
class Usage:
    """In tokens; cached: of the prompts, which the stages knew from an earlier session."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


@dataclass(frozen=True)
class Answer:
    """`pieces` of all answers, as they come; `usage` is complete when they have ended."""

    pieces: AsyncIterator[Piece]
    usage: Usage


@dataclass(frozen=True)
class Offer:
    """A version that can be asked for; `version` is its id. available: whether all its layers are served; chat:
    whether the tokenizer has a chat template; context: how many tokens prompt and answer have together at most; patch:
    the id of one that answers are to be given with, though no version has it, or empty."""

    name: str
    version: str
    number: str
    head: bool
    created: int
    available: bool
    chat: bool
    context: int
    patch: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}+{self.patch[:10]}" if self.patch else f"{self.name}@{self.number}"


class Answerer(Protocol):
    """Sessions in the swarm, on behalf of HTTP clients."""

    def offers(self) -> Sequence[Offer]:
        """All versions, the head first, and the head with each patch that waits for its round."""

    def find(self, model: str) -> Offer:
        """Of `name` (its head), `name@number`, or `name+patch`. Raises NotFound, InvalidInput."""

    def answer(self, offer: Offer, request: Request) -> AbstractAsyncContextManager[Answer]:
        """Begins all answers at once. Leaving it ends those that still run, and their sessions.

        Raises InvalidInput when the prompt is empty or too long, or has messages that the tokenizer has no template
        for. `pieces` raises Unreachable, naming the layers that nobody serves, Busy, and PeerFailed.
        """


StatusSource = Callable[[], Awaitable[dict[str, Any]]]
"""Gives what the status page shows, as JSON can hold it. Raises P2PModelError."""

Exposition = Callable[[], bytes]
"""The metrics, in Prometheus' text format."""
