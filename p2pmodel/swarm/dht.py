"""hivemind's DHT, with what a hostile peer can do to it bounded.

- A peer's place in the DHT follows from its id, so it cannot choose the keys that it answers for, nor take many places.
- A peer's answer is worth the records in it: bad ones are dropped one by one, and a claim to be newer ends no search.
- What is stored for others has a budget in bytes; caches, which anybody may write to, hold nothing.
- Messages are decoded within limits, and hold few enough records that checking them blocks nobody.
"""

import asyncio
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgpack
from hivemind.dht import DHTNode
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2
from hivemind.utils.serializer import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from p2pmodel.swarm.validator import MAX_VALUE_BYTES, RecordValidator

REPLICAS = 5
CALL_SECONDS = 3.0
BUCKET_SIZE = 20
MAX_KEYS_PER_CALL = 16
MAX_SUBKEYS = 10_000
STORE_BYTES = 64 << 20
_ENTRY_BYTES = 200
_DICTIONARY_CODE = 0x50


def dht_id(peer: PeerID) -> DHTID:
    return DHTID.generate(source=peer.to_bytes())


class Serializer(MSGPackSerializer):  # type: ignore[misc]
    """hivemind's encoding, less what nobody here sends: nested extensions cost a peer nothing and us gigabytes."""

    @classmethod
    def loads(cls, buf: bytes) -> Any:
        """Raises ValueError (as all of msgpack's errors are)."""
        return msgpack.unpackb(buf, raw=False, ext_hook=_load_dictionary, max_array_len=0, max_map_len=0)


def _load_dictionary(code: int, data: bytes) -> DictionaryDHTValue:
    if code != _DICTIONARY_CODE:
        raise ValueError("unknown extension")
    _, _, items = msgpack.unpackb(
        data, raw=False, ext_hook=_refuse, max_array_len=MAX_SUBKEYS, max_map_len=0, max_bin_len=MAX_VALUE_BYTES
    )
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():
        for subkey, value, expires in items:
            if not (isinstance(subkey, str) and isinstance(value, bytes) and isinstance(expires, float)):
                raise ValueError("malformed dictionary")
            dictionary.store(subkey, value, expires)
    return dictionary


def _refuse(code: int, data: bytes) -> None:
    raise ValueError("nested extension")


class Records:
    """Validated records by key and subkey, within a budget; the one that expires last wins. Stands in for hivemind's
    storage, which drops a new record when an older one of the same subkey, sent again, expires."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._bytes = 0
        self._swept = 0.0
        self._keys: dict[DHTID, dict[str, tuple[bytes, float]]] = {}

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expires: float) -> bool:
        now = time.time()
        if now >= self._swept + 1:
            self._sweep(now)
        known = self._keys.get(key, {}).get(subkey)
        if expires <= now or (known and known[1] >= expires):
            return False
        growth = len(value) - len(known[0]) if known else len(value) + _ENTRY_BYTES
        if self._bytes + growth > self._budget or len(self._keys.get(key, ())) >= MAX_SUBKEYS:
            return False
        self._bytes += growth
        self._keys.setdefault(key, {})[subkey] = (value, expires)
        return True

    def store(self, key: DHTID, value: bytes, expires: float, subkey: str | None = None) -> bool:
        return subkey is not None and self.store_subkey(key, subkey, value, expires)

    def get(self, key: DHTID) -> ValueWithExpiration | None:
        """A copy: hivemind's searches merge what other peers return into it."""
        now = time.time()
        dictionary = DictionaryDHTValue()
        for subkey, (value, expires) in self._keys.get(key, {}).items():
            if expires > now:
                dictionary.store(subkey, value, expires)
        return ValueWithExpiration(dictionary, dictionary.latest_expiration_time) if dictionary else None

    def items(self) -> Iterator[Any]:
        """What to hand to a peer that joins nearer to a key: nothing, since every record is soon renewed anyway."""
        return iter(())

    def __contains__(self, key: DHTID) -> bool:
        return key in self._keys

    def _sweep(self, now: float) -> None:
        self._swept = now
        for key, subkeys in list(self._keys.items()):
            for subkey in [s for s, (_, expires) in subkeys.items() if expires <= now]:
                self._bytes -= len(subkeys.pop(subkey)[0]) + _ENTRY_BYTES
            if not subkeys:
                del self._keys[key]


class RecordProtocol(DHTProtocol):  # type: ignore[misc]
    """The RPCs between DHTs, under p2pmodel's own protocol names: other hivemind swarms never meet this one."""

    serializer = Serializer
    _rpc_handlers = None

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return f"p2pmodel/dht/1/{method_name}"

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> "RecordProtocol":
        self: RecordProtocol = await super().create(*args, **kwargs)
        self.storage, self.cache = Records(STORE_BYTES), Records(0)
        return self

    async def rpc_store(self, request: dht_pb2.StoreRequest, context: P2PContext) -> dht_pb2.StoreResponse:
        if len(request.keys) > MAX_KEYS_PER_CALL or self.IS_DICTIONARY in request.subkeys:
            raise ValueError("too many records")
        return await super().rpc_store(request, context)

    async def rpc_find(self, request: dht_pb2.FindRequest, context: P2PContext) -> dht_pb2.FindResponse:
        if len(request.keys) > MAX_KEYS_PER_CALL:
            raise ValueError("too many keys")
        return await super().rpc_find(request, context)

    async def call_find(self, peer: PeerID, keys: Collection[DHTID]) -> Any:
        answers = await super().call_find(peer, keys)
        return answers and {key: (_worth(found), _neighbours(nearest)) for key, (found, nearest) in answers.items()}

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        if node_id is not None and node_id == dht_id(peer_id):
            await super().update_routing_table(node_id, peer_id, responded)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        with dictionary.freeze():
            for subkey, (value, expires) in list(dictionary.items()):
                if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expires):
                    del dictionary[subkey]
        return bool(dictionary)


def _worth(found: ValueWithExpiration | None) -> ValueWithExpiration | None:
    if found is None or not isinstance(found.value, DictionaryDHTValue) or not found.value:
        return None
    return ValueWithExpiration(found.value, max(expires for _, (_, expires) in found.value.data.items()))


def _neighbours(nearest: dict[DHTID, PeerID]) -> dict[DHTID, PeerID]:
    return {node: peer for node, peer in list(nearest.items())[:BUCKET_SIZE] if node == dht_id(peer)}


async def create_node(p2p: P2P, client_only: bool) -> DHTNode:
    """A member of the DHT that has met nobody yet; with client_only one that answers no requests and stores nothing."""
    node_id = dht_id(p2p.peer_id)
    node = await DHTNode.create(
        p2p=p2p,
        node_id=node_id,
        client_mode=True,
        wait_timeout=CALL_SECONDS,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )
    node.protocol = await RecordProtocol.create(
        p2p,
        node_id,
        bucket_size=BUCKET_SIZE,
        depth_modulo=5,
        num_replicas=REPLICAS,
        wait_timeout=CALL_SECONDS,
        client_mode=client_only,
        record_validator=RecordValidator(),
    )
    return node


async def store(node: DHTNode, key: DHTID, subkey: str, record: bytes, expires: float) -> int:
    """Stores a record with the peers nearest to the key; how many took it."""
    value = Serializer.dumps(record)
    nearest = await node.find_nearest_nodes([key], k_nearest=REPLICAS + 1, exclude_self=True)
    peers: Sequence[PeerID] = list(nearest[key].values())
    answers = await asyncio.gather(
        *(node.protocol.call_store(peer, [key], [value], [expires], subkeys=[subkey]) for peer in peers)
    )
    taken = sum(bool(answer and answer[0]) for answer in answers)
    if not node.protocol.client_mode:
        taken += node.protocol.storage.store_subkey(key, subkey, value, expires)
    return taken
