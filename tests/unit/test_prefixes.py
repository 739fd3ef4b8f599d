"""Beginnings of sessions, known by their bytes: keys, what is found, what is forgotten."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig

from p2pmodel.domain.swarm import PREFIX_BLOCK, Span
from p2pmodel.engine.cache import StageCache
from p2pmodel.engine.prefixes import KeyChain, PrefixStore, Trail, prefix_keys

TOKEN_BYTES = 4
CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)


def text(seed: int, tokens: int) -> bytes:
    numbers = torch.randint(0, 256, (tokens * TOKEN_BYTES,), generator=torch.Generator().manual_seed(seed))
    return bytes(numbers.to(torch.uint8).numpy())


def new_cache(tokens: int = 0) -> StageCache:
    """With keys that say which token they are of."""
    cache = StageCache(CONFIG, Span(0, 2), 1024)
    if tokens:
        fill(cache, tokens)
    return cache


def fill(cache: StageCache, tokens: int) -> None:
    states = torch.arange(cache.seen, cache.seen + tokens).float().view(1, 1, -1, 1).expand(1, 1, -1, 4)
    for layer in range(2):
        cache.update(states, -states, layer)
    cache.seen += tokens


def run(store: PrefixStore, body: bytes, *, scope: str = "v1") -> Trail:
    """A session that takes in `body`, as far as it is not known."""
    cache = new_cache()
    trail = store.begin((scope,), TOKEN_BYTES, cache, prefix_keys(body, TOKEN_BYTES))
    rest = body[cache.seen * TOKEN_BYTES :]
    fill(cache, len(rest) // TOKEN_BYTES)
    store.add(trail, rest, rest[::-1])
    return trail


def keys_of(cache: StageCache) -> Tensor:
    layer: Any = cache.layers[0]
    return torch.as_tensor(layer.keys[0, 0, :, 0])


@given(cuts=st.lists(st.integers(1, 90), max_size=6))
def test_keys_do_not_depend_on_how_the_tokens_came(cuts: list[int]) -> None:
    body, chain, at = text(0, 100), KeyChain(TOKEN_BYTES), 0
    for end in [*sorted(set(cuts)), 100]:
        chain.add(body[at * TOKEN_BYTES : end * TOKEN_BYTES])
        at = end
    assert tuple(chain.keys) == prefix_keys(body, TOKEN_BYTES)
    assert len(chain.keys) == 100 // PREFIX_BLOCK


@given(position=st.integers(0, 100 * TOKEN_BYTES - 1))
def test_a_byte_changes_its_block_and_all_that_follow(position: int) -> None:
    body = text(0, 100)
    other = bytearray(body)
    other[position] ^= 1
    ours, theirs = prefix_keys(body, TOKEN_BYTES), prefix_keys(other, TOKEN_BYTES)
    block = position // TOKEN_BYTES // PREFIX_BLOCK
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [n < block for n in range(len(ours))]


def test_a_second_session_finds_what_the_first_computes_while_it_runs_and_afterwards() -> None:
    store = PrefixStore()
    first = run(store, text(0, 70))
    for body, found in ((text(0, 70), 2), (text(0, 40), 1), (text(1, 70), 0)):
        trail = run(store, body)
        assert trail.found == found
        assert torch.equal(keys_of(trail.cache), torch.arange(len(body) // TOKEN_BYTES))
        assert trail.outgoing.keys[:found] == first.outgoing.keys[:found]
        store.end(trail, keep=False)
    store.end(run(store, text(0, 70)), keep=True)
    assert store.retained_tokens == 0  # the first still runs, and holds the same
    store.end(first, keep=True)
    assert store.retained_tokens == 2 * PREFIX_BLOCK
    assert run(store, text(0, 70)).found == 2
    assert run(store, text(0, 70), scope="v2").found == 0


def test_a_longer_session_takes_the_place_of_what_it_began_with() -> None:
    store = PrefixStore()
    for turn in (40, 80, 120):
        store.end(run(store, text(0, turn)), keep=True)
    assert store.retained_tokens == 120 // PREFIX_BLOCK * PREFIX_BLOCK


def test_the_longest_unused_gives_way_first() -> None:
    store = PrefixStore()
    for seed in (1, 2, 3):
        store.end(run(store, text(seed, 40)), keep=True)
    used = run(store, text(1, 40))
    store.end(used, keep=True)
    store.shrink(2 * PREFIX_BLOCK)
    assert [run(store, text(seed, 40)).found for seed in (1, 2, 3)] == [1, 0, 1]
    store.shrink(0)
    assert store.retained_tokens == 0


def test_what_a_session_takes_back_is_not_found_any_more() -> None:
    store = PrefixStore()
    trail = run(store, text(0, 70))
    store.cut(trail, 40)
    assert run(store, text(0, 70)).found == 1
    store.add(trail, text(5, 60), text(5, 60))  # its keys would lack the eight tokens before
    assert len(trail.incoming.keys) == 1


@pytest.mark.parametrize("tokens", [1, PREFIX_BLOCK - 1])
def test_less_than_a_block_is_nothing(tokens: int, tmp_path: Path) -> None:
    store = PrefixStore()
    store.end(run(store, text(0, tokens)), keep=True)
    assert store.retained_tokens == 0
