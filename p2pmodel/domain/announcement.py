"""What gossip carries: that a record exists, and who has it. The record itself is fetched by its digest."""

from dataclasses import dataclass

from p2pmodel.domain.ids import ModelId, PeerId, check_digest, check_peer
from p2pmodel.domain.model import BlobRef

RECORD_KINDS = ("patch", "candidate", "verdict")
MAX_ANNOUNCEMENT_BYTES = 4096


@dataclass(frozen=True)
class Announcement:
    """`record` is the digest of the signed record's bytes; `holder` has it, and has signed this."""

    holder: PeerId
    model: ModelId
    kind: str
    record: BlobRef

    def __post_init__(self) -> None:
        check_peer(self.holder, "announcement holder")
        check_digest(self.model, "announcement model")
        if self.kind not in RECORD_KINDS:
            raise ValueError(f"nothing of kind {self.kind[:32]!r} is announced")
