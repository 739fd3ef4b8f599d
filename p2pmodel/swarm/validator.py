"""Who may say what in the DHT: a peer, of itself, for as long as a lease lasts.

A value is the signed record of a lease, of layers or of experts, or of a presence. Its key follows from its kind and
its model, its subkey is its signer, its expiration the noun's: so a record fits into one place only, and into none when
anybody else made it.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import msgpack
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.experts import ExpertLease
from p2pmodel.domain.ids import ModelId
from p2pmodel.domain.swarm import LEASE_SECONDS, Lease, Presence
from p2pmodel.wire import records
from p2pmodel.wire.signing import RECORD_OVERHEAD

CLOCK_TOLERANCE_SECONDS = 3.0
"""How far ahead of ours a peer's clock may be."""

MAX_VALUE_BYTES = records.MAX_DHT_BYTES + RECORD_OVERHEAD
Entry = Lease | Presence | ExpertLease
_OPENERS: dict[str, Callable[[bytes], Entry]] = {
    "lease": records.open_lease,
    "presence": records.open_presence,
    "experts": records.open_expert_lease,
}


def dht_key(kind: str, model: ModelId) -> DHTID:
    return DHTID.generate(source=f"p2pmodel/1/{kind}/{model}")


@lru_cache(maxsize=4096)
def open_dht_record(record: bytes) -> tuple[str, Entry]:
    """The kind and the noun of a signed record; verified once, however many replicas return it. Raises Rejected."""
    kind = records.record_kind(record, MAX_VALUE_BYTES)
    if kind not in _OPENERS:
        raise Rejected("kind", f"The DHT holds no records of kind {kind[:32]!r}.")
    return kind, _OPENERS[kind](record)


def check_validity(noun: Entry, now: float) -> None:
    """Raises Rejected("expiry") when the noun claims more than a lease may."""
    if noun.expires > now + LEASE_SECONDS + CLOCK_TOLERANCE_SECONDS:
        raise Rejected("expiry", f"A record of {noun.peer} would be valid for longer than {LEASE_SECONDS:.0f} s.")


class RecordValidator(RecordValidatorBase):  # type: ignore[misc]
    """Asked by hivemind before a record is stored for others, and before one that others return is believed.

    Records that have expired are not refused here: stores drop them, and readers leave them out.
    """

    def validate(self, record: DHTRecord) -> bool:
        if len(record.value) > MAX_VALUE_BYTES:
            return False
        value = record.value[3:] if record.value[:1] == b"\xc5" else record.value[2:]
        if msgpack.packb(value) != record.value:
            return False
        try:
            kind, noun = open_dht_record(value)
            check_validity(noun, time.time())
        except Rejected:
            return False
        return bool(
            record.subkey == msgpack.packb(noun.peer)
            and record.key == dht_key(kind, noun.model).to_bytes()
            and record.expiration_time == noun.expires
        )
