"""Examples to tokens, and which of these are learned."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.data.rows import ANSWERING, Chat, Completion

MARK = "\ue000\ue001\ue002"
"""In the place of an answer: characters that no text has."""
Ranges = list[tuple[int, int]]
"""Of characters, half open."""


@dataclass(frozen=True)
class Answer:
    """Tokens of one example, and for each whether it is learned. The first one never is: nothing predicts it."""

    ids: "array[int]"
    learned: bytes

    def window(self, width: int) -> "Answer":
        """At most `width` of the tokens: of a prompt the end, of an answer that is too long by itself the beginning."""
        begin = max(0, min(len(self.ids) - width, self.learned.index(1) - 1))
        return Answer(self.ids[begin : begin + width], self.learned[begin : begin + width])

    @property
    def key(self) -> tuple[bytes, bytes]:
        return self.ids.tobytes(), self.learned


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the special tokens that the tokenizer puts there itself, as everybody who loads it has them: models whose
    tokenizers put none were not trained with any. An empty text is the token that begins one, where there is such."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"] if text else []
    start = tokenizer.bos_token_id
    return ids if ids or start is None else [int(start)]


def encode_answers(tokenizer: PreTrainedTokenizerBase, example: Completion | Chat) -> Answer:
    """Raises ValueError that says what is wrong with the example, InvalidInput when the tokenizer cannot do it."""
    if not tokenizer.is_fast:
        raise InvalidInput(
            "This model's tokenizer cannot tell where its tokens are in the text, so answers cannot be learned alone.",
            "Give the examples as plain text.",
        )
    if isinstance(example, Chat):
        text, ranges = _render(tokenizer, example)
    else:
        text = example.prompt + example.completion
        ranges = [(len(example.prompt), len(text))]
    completion = isinstance(example, Completion)
    encoded = tokenizer(text, add_special_tokens=completion, return_offsets_mapping=True, verbose=False)
    ids = [int(i) for i in encoded["input_ids"]]
    learned = [any(low < end and start < high for low, high in ranges) for start, end in encoded["offset_mapping"]]
    stop = tokenizer.eos_token_id
    if completion and stop is not None:
        if ids and ids[-1] == stop and not learned[-1]:
            learned[-1] = True
        else:
            ids, learned = [*ids, int(stop)], [*learned, True]
    if learned and learned[0]:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else stop
        ids = ids if start is None else [int(start), *ids]
        learned = [False, *(learned[1:] if start is None else learned)]
    if not any(learned):
        raise ValueError("has an answer without a token")
    return Answer(array("i", ids), bytes(learned))


def _render(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, Ranges]:
    """The chat as the tokenizer's template writes it, and where its answers are, with what ends each of them.

    Templates write a turn differently when it is the last one (thoughts come and go), so that a beginning of the chat
    is not always a beginning of the text. Where an answer is, is seen from the chat with something unmistakable in its
    place; what ends it, from the last one, after which nothing follows.
    """
    if not tokenizer.chat_template:
        raise InvalidInput(
            "This model's tokenizer has no chat template, which the column messages needs.",
            "Give prompt and completion instead.",
        )
    text = _templated(tokenizer, chat.turns, False)
    answers = [(index, content.strip()) for index, (role, content) in enumerate(chat.turns) if role == ANSWERING]
    around = [_around(tokenizer, chat.turns, index) for index, _ in answers]
    tail = around[-1][1]
    ranges: Ranges = []
    for (index, content), (lead, _) in zip(answers, around, strict=True):
        if not text.startswith(lead + content):
            raise ValueError("has an answer that the chat template does not write as it is")
        before = _templated(tokenizer, chat.turns[:index], True) if index else ""
        begin = len(before) if before and lead.startswith(before) else len(lead)
        end = len(lead) + len(content)
        ranges.append((begin, end + _shared(text[end:], tail)))
    return text, ranges


def _around(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], index: int) -> tuple[str, str]:
    """What the template writes before the content of a turn, and after it."""
    marked = [(role, MARK if at == index else content) for at, (role, content) in enumerate(turns)]
    lead, mark, tail = _templated(tokenizer, marked, False).partition(MARK)
    if not mark:
        raise ValueError("has an answer that the chat template does not write as it is")
    return lead, tail


def _templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], answer_next: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except TemplateError as error:
        raise ValueError(f"does not fit the chat template: {str(error)[:100]}") from None
    assert isinstance(text, str)
    return text


def _shared(a: str, b: str) -> int:
    """How many characters both begin with."""
    length = min(len(a), len(b))
    return next((at for at in range(length) if a[at] != b[at]), length)
