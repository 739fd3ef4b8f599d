"""Sessions of several rows, of beams, of tokens taken back, and forwards that sessions share, against transformers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.domain.ports import Buffer, Noted
from p2pmodel.domain.swarm import Span
from p2pmodel.engine.cache import attends_only
from p2pmodel.engine.checkpoint import load_whole, read_checkpoint
from p2pmodel.engine.head import RemoteCache, load_head
from p2pmodel.engine.prefixes import prefix_keys
from p2pmodel.engine.stage import load_stage
from p2pmodel.engine.steps import Note
from p2pmodel.engine.trial import can_batch
from p2pmodel.tensors import ia3
from p2pmodel.tensors.blob import pack
from tests.integration.test_stages import (
    BASE,
    LAYERS,
    TUNED,
    WIDTH,
    chain_of,
    folders,
    prompt,
    request,
    runner_of,
    saved,
)

__all__ = ["folders"]

pytestmark = pytest.mark.usefixtures("one_thread")

PADDED = ("llama", "mistral", "gpt2", "opt", "bloom", "gemma3_text", "qwen3_moe")
SHARING = {name: True for name in ("llama", "mistral", "gemma2", "gpt2", "mixtral")} | {"bloom": False, "mamba": False}


def padded_batch() -> tuple[Tensor, Tensor]:
    """Three rows of different lengths, padded on the left."""
    lengths, longest = (7, 3, 5), 7
    ids, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt(length)
        mask[row, longest - length :] = 1
    return ids, mask


def numbers(body: Buffer | Noted) -> Tensor:
    assert not isinstance(body, Noted)
    return torch.frombuffer(bytearray(body), dtype=torch.float32)


@pytest.mark.parametrize("family", PADDED)
def test_padded_rows_are_answered_as_the_whole_model_answers(family: str, folders: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(saved(family, folders))
    whole, chain = load_whole(checkpoint.path), chain_of(checkpoint, 1, 2)
    head = load_head(checkpoint, chain)
    ids, mask = padded_batch()
    with torch.inference_mode():
        ours, theirs = (m(input_ids=ids, attention_mask=mask).logits for m in (head, whole))
    assert torch.equal(ours[mask.bool()], theirs[mask.bool()])
    options = {"attention_mask": mask, "max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    assert torch.equal(head.generate(ids, **options), whole.generate(ids, **options))
    assert not chain.open_sessions


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "mamba"])
def test_beams_are_those_of_the_whole_model(family: str, folders: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(saved(family, folders))
    whole, chain = load_whole(checkpoint.path), chain_of(checkpoint, 1)
    head = load_head(checkpoint, chain)
    ids, mask = padded_batch()
    options = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert torch.equal(head.generate(ids, **options), whole.generate(ids, **options))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "opt"])
def test_a_draft_changes_the_pace_and_not_the_answer(family: str, folders: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(saved(family, folders))
    whole, chain = load_whole(checkpoint.path), chain_of(checkpoint, 1, 2)
    head = load_head(checkpoint, chain)
    draft = load_whole(checkpoint.path)
    with torch.no_grad():  # right often, and wrong now and then
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    drafted = head.generate(prompt(), assistant_model=draft, **options)
    assert torch.equal(drafted, whole.generate(prompt(), **options))


def test_families_with_states_that_pass_take_nothing_back(folders: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(saved("mamba", folders))
    assert not attends_only(checkpoint.config)
    with pytest.raises(InvalidInput, match="go back"):
        chain_of(checkpoint, 1).open(16, rewinds=True)


def test_a_session_goes_back_only_when_it_said_so(folders: dict[str, Path]) -> None:
    runner = runner_of(load_stage(read_checkpoint(saved("mistral", folders)), Span(0, LAYERS)))
    steps = torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(3))

    def body(start: int, end: int) -> bytes:
        return bytes(steps[:, start:end].contiguous().numpy().tobytes())

    plain = runner.open(request(Span(0, LAYERS)))
    back = runner.open(request(Span(0, LAYERS), rewinds=True))
    expected = [runner.step([(plain, n, b"", body(n, n + 1))])[0] for n in range(12)]
    for position, end in ((0, 6), (4, 9), (6, 10), (10, 11), (10, 12)):
        (answer,) = runner.step([(back, position, b"", body(position, end))])
        assert not isinstance(answer, Exception)
        ours = numbers(answer).view(-1, WIDTH)
        for token, output in zip(range(position, end), ours, strict=True):
            theirs = expected[token]
            assert not isinstance(theirs, Exception)
            assert torch.allclose(output, numbers(theirs), atol=1e-5)
    (refused,) = runner.step([(back, 9, b"", body(9, 10))])  # the step before began at 10
    assert isinstance(refused, Rejected)
    (refused,) = runner.step([(plain, 4, b"", body(4, 5))])
    assert isinstance(refused, Rejected)


@pytest.mark.parametrize("family", SHARING)
def test_sessions_of_different_lengths_rows_and_versions_share_a_forward(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = read_checkpoint(saved(family, folders))
    stage = load_stage(checkpoint, Span(0, LAYERS))
    assert can_batch(stage) is SHARING[family]
    state = {} if family == "mamba" else {s.name: torch.full(s.shape, 1.5) for s in ia3.find_slots(stage.base)}
    runner = runner_of(stage, state)
    shared: list[int] = []
    forward = stage.forward_sessions

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared.append(hidden.shape[0])
        return forward(hidden, *args, **kwargs)

    monkeypatch.setattr(stage, "forward_sessions", counted)
    generator = torch.Generator().manual_seed(2)
    kinds = [(4, 1, BASE), (9, 1, TUNED), (2, 2, BASE), (6, 1, TUNED)]
    together, alone = (
        [runner.open(request(Span(0, LAYERS), 24, version, rows=rows)) for _, rows, version in kinds] for _ in range(2)
    )
    for (length, rows, _), one, other in zip(kinds, together, alone, strict=True):
        body = torch.randn(rows, length, WIDTH, generator=generator).numpy().tobytes()
        runner.step([(one, 0, b"", body)])
        runner.step([(other, 0, b"", body)])
    for step in range(4):
        items = [(n + step, torch.randn(rows, 1, WIDTH, generator=generator).numpy().tobytes()) for n, rows, _ in kinds]
        ours = runner.step([(h, n, b"", body) for h, (n, body) in zip(together, items, strict=True)])
        theirs = [runner.step([(h, n, b"", body)])[0] for h, (n, body) in zip(alone, items, strict=True)]
        for mine, its in zip(ours, theirs, strict=True):
            assert not isinstance(mine, Exception)
            assert not isinstance(its, Exception)
            assert torch.allclose(numbers(mine), numbers(its), rtol=1e-4, atol=1e-4)
    assert shared == ([5] * 4 if SHARING[family] else [])


def test_a_failure_in_a_shared_forward_is_told_to_all_who_share_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load_stage(read_checkpoint(saved("llama", folders)), Span(0, LAYERS))
    runner = runner_of(stage)
    sessions = [runner.open(request(Span(0, LAYERS), 8)) for _ in range(3)]
    body = torch.ones(1, WIDTH).numpy().tobytes()
    for session in sessions:
        runner.step([(session, 0, b"", body)])

    def fail(*args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stage, "forward_sessions", fail)
    nan = torch.full((1, WIDTH), torch.nan).numpy().tobytes()
    outputs = runner.step([(sessions[0], 1, b"", body), (sessions[1], 1, b"", body), (sessions[2], 1, b"", nan)])
    assert [type(output).__name__ for output in outputs] == ["PeerFailed", "PeerFailed", "Rejected"]


def test_only_what_is_wanted_comes_back(folders: dict[str, Path]) -> None:
    checkpoint = read_checkpoint(saved("llama", folders))
    chain = chain_of(checkpoint, 1)
    head = load_head(checkpoint, chain)
    cache = RemoteCache(chain, 16)
    with torch.inference_mode():
        last = head(input_ids=prompt(7), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        assert torch.equal(last, load_whole(checkpoint.path)(input_ids=prompt(7), logits_to_keep=1).logits)
    session = chain.open(16)
    hidden = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    assert session.forward(hidden, 0, Note(wanted=2)).shape == (1, 2, WIDTH)


@pytest.mark.parametrize(
    "meta", [b"\x80", Note(order=torch.tensor([2, 0])).encode(), Note(mask=torch.ones(2, 9, dtype=torch.bool)).encode()]
)
def test_notes_that_do_not_fit_are_refused(meta: bytes, folders: dict[str, Path]) -> None:
    runner = runner_of(load_stage(read_checkpoint(saved("llama", folders)), Span(0, LAYERS)))
    session = runner.open(request(Span(0, LAYERS), 8, rows=2))
    (refused,) = runner.step([(session, 0, meta, torch.ones(2, 1, WIDTH).numpy().tobytes())])
    assert isinstance(refused, Rejected)


def test_sessions_with_vectors_of_their_own_share_a_forward(folders: dict[str, Path]) -> None:
    runner = runner_of(load_stage(read_checkpoint(saved("llama", folders)), Span(0, LAYERS)))
    slots = ia3.find_slots(runner._stage.base)
    steps = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(3))

    def opened(seed: int) -> Any:
        handle = runner.open(request(Span(0, LAYERS)))
        if seed:
            generator = torch.Generator().manual_seed(seed)
            runner.load(handle, pack({s.name: torch.rand(s.shape, generator=generator) + 0.5 for s in slots}))
        return handle

    def step(handles: list[Any], n: int) -> list[Tensor]:
        body = bytes(steps[:, n : n + 1].contiguous().numpy().tobytes())
        outputs = runner.step([(handle, n, b"", body) for handle in handles])
        assert not any(isinstance(output, Exception) for output in outputs)
        return [numbers(output) for output in outputs if not isinstance(output, Exception)]

    together, alone = [opened(seed) for seed in range(4)], [opened(seed) for seed in range(4)]
    for n in range(4):
        ours, theirs = step(together, n), [step([handle], n)[0] for handle in alone]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert len({tuple(numbers.tolist()) for numbers in ours}) == len(ours)
    with pytest.raises(Rejected, match="before its first step"):
        runner.load(together[0], pack({}))


def test_what_a_session_with_vectors_of_its_own_computed_is_not_reused(folders: dict[str, Path]) -> None:
    runner = runner_of(load_stage(read_checkpoint(saved("llama", folders)), Span(0, LAYERS)))
    slots = ia3.find_slots(runner._stage.base)
    steps = torch.randn(1, 40, WIDTH, generator=torch.Generator().manual_seed(3))
    body = bytes(steps.numpy().tobytes())
    keys = prefix_keys(body[: 32 * WIDTH * 4], WIDTH * 4)
    own = runner.open(replace(request(Span(0, LAYERS), 64), prefix=keys))
    runner.load(own, pack({slot.name: torch.full(slot.shape, 2.0) for slot in slots}))
    runner.step([(own, 0, b"", body)])
    runner.close(own)
    assert runner.known(runner.open(replace(request(Span(0, LAYERS), 64), prefix=keys))) == ()
