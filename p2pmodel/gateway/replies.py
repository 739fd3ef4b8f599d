"""Answers in the forms of OpenAI's API: whole objects, and the chunks of a stream."""

import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from p2pmodel.gateway.ports import Offer, Piece, TokenScore, Usage


def model_entry(offer: Offer) -> dict[str, Any]:
    return {
        "id": offer.title,
        "object": "model",
        "created": offer.created,
        "owned_by": "p2pmodel",
        "available": offer.available,
        "chat": offer.chat,
        "context": offer.context,
        "version": offer.number,
    }


def model_list(offers: Sequence[Offer]) -> dict[str, Any]:
    """The head is known by the model's name alone, and every version, the head too, by name@number; patches by
    name+patch."""
    entries = []
    for offer in offers:
        entry = model_entry(offer)
        if offer.head:
            entries.append({**entry, "id": offer.name})
        entries.append(entry)
    return {"object": "list", "data": entries}


class Reply:
    """What the parts of one answer have in common. chat: which of the two APIs it is for; scored: whether the client
    asked for log-probabilities."""

    def __init__(self, model: str, version: str, *, chat: bool, scored: bool) -> None:
        self._chat, self._scored = chat, scored
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()
        self.id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._head = {
            "id": self.id,
            "object": "",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"p2pmodel_{version[:10]}",
        }

    def whole(self, pieces: Iterable[Piece], answers: int, usage: Usage) -> dict[str, Any]:
        texts, tokens, finishes = [""] * answers, [list[TokenScore]() for _ in range(answers)], ["length"] * answers
        for piece in pieces:
            texts[piece.index] += piece.text
            tokens[piece.index].extend(piece.tokens)
            finishes[piece.index] = piece.finish or finishes[piece.index]
        choices = []
        for index in range(answers):
            body: dict[str, Any] = {"index": index, "finish_reason": finishes[index]}
            if self._chat:
                body["message"] = {"role": "assistant", "content": texts[index], "refusal": None}
            else:
                body["text"] = texts[index]
            body["logprobs"] = self._logprobs(index, tokens[index])
            choices.append(body)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage_entry(usage)}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        body: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish}
        if self._chat:
            delta: dict[str, Any] = {} if piece.index in self._begun else {"role": "assistant"}
            if piece.text or delta:
                delta["content"] = piece.text
            body["delta"] = delta
            self._begun.add(piece.index)
        else:
            body["text"] = piece.text
        body["logprobs"] = self._logprobs(piece.index, piece.tokens) if piece.tokens else None
        return self._chunk([body])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage_entry(usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _logprobs(self, index: int, tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._scored:
            return None
        if self._chat:
            return {"content": [_scored(token) for token in tokens], "refusal": None}
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text: value for text, _, value in reversed(token.alternatives)} for token in tokens],
            "text_offset": offsets,
        }


def usage_entry(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _scored(token: TokenScore) -> dict[str, Any]:
    return {
        **_entry(token.text, token.raw, token.logprob),
        "top_logprobs": [_entry(*alternative) for alternative in token.alternatives],
    }


def _entry(text: str, raw: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(raw)}
