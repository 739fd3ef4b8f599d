"""Beginnings of sessions that a stage has computed already, found by what came in.

A prefix is named by a chain of hashes over the encoded hidden states, block by block: what a stage was sent, not what
somebody says of it. So nobody can put words into another one's session, and a stage needs to know no tokens. Beside
the keys of what came in stand those of what went out, by which the next stage finds its own part.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from p2pmodel.domain.ports import Buffer
from p2pmodel.domain.swarm import PREFIX_BLOCK
from p2pmodel.engine.cache import StageCache

KEY_BYTES = 16
_NOTHING = bytes(KEY_BYTES)


class KeyChain:
    """The keys of a stream of tokens: each stands for one block, and for all that came before it."""

    def __init__(self, token_bytes: int, keys: Sequence[bytes] = ()) -> None:
        self.keys = list(keys)
        self.token_bytes = token_bytes
        self._tokens = 0
        self._hash = self._next_hash()

    def add(self, body: Buffer) -> None:
        """Further tokens, encoded one behind another."""
        view = memoryview(body).cast("B")
        while view:
            part = view[: (PREFIX_BLOCK - self._tokens) * self.token_bytes]
            view = view[len(part) :]
            self._hash.update(part)
            self._tokens += len(part) // self.token_bytes
            if self._tokens == PREFIX_BLOCK:
                self.keys.append(self._hash.digest())
                self._tokens, self._hash = 0, self._next_hash()

    def part(self, blocks: int) -> "KeyChain":
        """The first so many blocks, to go on from there."""
        return KeyChain(self.token_bytes, self.keys[:blocks])

    def _next_hash(self) -> "hashlib.blake2b":
        return hashlib.blake2b(self.keys[-1] if self.keys else _NOTHING, digest_size=KEY_BYTES)


def prefix_keys(body: Buffer, token_bytes: int) -> tuple[bytes, ...]:
    """Of all whole blocks of a body."""
    chain = KeyChain(token_bytes)
    chain.add(body)
    return tuple(chain.keys)


@dataclass(eq=False)
class Trail:
    """What went through one session, and the cache that holds it. scope: what two sessions have to have in common
    beside the keys: version, span, codec. owned: keys under which it is found."""

    scope: tuple[object, ...]
    cache: StageCache
    incoming: KeyChain
    outgoing: KeyChain
    owned: int = 0
    found: int = 0
    """Blocks that were taken over from an earlier session."""
    stalled: bool = False
    """Went back into the middle of a block, whose beginning is gone: it grows no further."""


class PrefixStore:
    """Not thread-safe. Sessions' trails while they run, and those of ended sessions until their room is needed."""

    def __init__(self) -> None:
        self._index: dict[tuple[object, ...], tuple[Trail, int]] = {}
        self._retained: OrderedDict[Trail, int] = OrderedDict()

    @property
    def retained_tokens(self) -> int:
        return sum(self._retained.values())

    def begin(self, scope: tuple[object, ...], token_bytes: int, cache: StageCache, keys: Sequence[bytes]) -> Trail:
        """A trail for a new session with an empty `cache`, which takes over the longest known beginning of `keys`."""
        for blocks in range(len(keys), 0, -1):
            known = self._index.get((*scope, keys[blocks - 1]))
            if known is not None:
                source = known[0]
                if source in self._retained:
                    self._retained.move_to_end(source)
                cache.take_over(source.cache, blocks * PREFIX_BLOCK)
                incoming, outgoing = source.incoming.part(blocks), source.outgoing.part(blocks)
                trail = Trail(scope, cache, incoming, outgoing, found=blocks)
                self._own(trail, 0)
                return trail
        return Trail(scope, cache, KeyChain(token_bytes), KeyChain(token_bytes))

    def add(self, trail: Trail, body: Buffer, output: Buffer | None) -> None:
        """A step that the session's cache has taken in. output: None at the last stage, where nobody follows."""
        if trail.stalled:
            return
        before = len(trail.incoming.keys)
        trail.incoming.add(body)
        trail.outgoing.add(body if output is None else output)
        self._own(trail, before)

    def cut(self, trail: Trail, position: int) -> None:
        """The session goes on from `position`; what followed is no longer in its cache."""
        blocks, rest = divmod(position, PREFIX_BLOCK)
        self._disown(trail, blocks)
        trail.incoming, trail.outgoing = trail.incoming.part(blocks), trail.outgoing.part(blocks)
        trail.stalled = trail.stalled or rest > 0

    def end(self, trail: Trail, keep: bool) -> None:
        """The session is over. Its trail stays if it is to be kept, and anything can be found by it."""
        tokens = len(trail.incoming.keys) * PREFIX_BLOCK
        if keep and trail.owned:
            trail.cache.trim(tokens)
            self._retained[trail] = tokens
        else:
            self._disown(trail, 0)

    def shrink(self, tokens: int) -> None:
        """Forgets ended sessions, the longest unused first, until at most so many tokens are retained."""
        while self._retained and self.retained_tokens > tokens:
            trail, _ = self._retained.popitem(last=False)
            self._disown(trail, 0)

    def _own(self, trail: Trail, start: int) -> None:
        """It is found by its keys from block `start` on: by those that are new, and instead of sessions that ended,
        whose room is free once nothing is found by them any more."""
        for blocks, key in enumerate(trail.incoming.keys[start:], start + 1):
            owner, _ = self._index.get((*trail.scope, key), (None, 0))
            if owner is not None and owner not in self._retained:
                continue
            if owner is not None:
                owner.owned -= 1
                if not owner.owned:
                    del self._retained[owner]
            trail.owned += 1
            self._index[(*trail.scope, key)] = (trail, blocks)

    def _disown(self, trail: Trail, blocks: int) -> None:
        for key in trail.incoming.keys[blocks:]:
            entry = self._index.get((*trail.scope, key))
            if entry is not None and entry[0] is trail:
                del self._index[(*trail.scope, key)]
                trail.owned -= 1
