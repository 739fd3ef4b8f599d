"""How large a signed record may be: what is larger is refused by its length, before anything else is looked at."""

from collections.abc import Callable

import pytest

from p2pmodel.domain.errors import Rejected
from p2pmodel.wire import canonical, records
from p2pmodel.wire.signing import RECORD_OVERHEAD, Key, Signed

KEY = Key.generate()


@pytest.mark.parametrize(
    ("kind", "read", "limit"),
    [
        ("manifest", records.open_manifest, 32 << 20),
        ("patch", records.open_patch, 1 << 20),
        ("candidate", records.open_candidate, 1 << 20),
        ("verdict", records.open_verdict, 64 << 10),
        ("lease", records.open_lease, 8 << 10),
        ("presence", records.open_presence, 8 << 10),
        ("announcement", records.open_announcement, 4 << 10),
    ],
    ids=("manifest", "patch", "candidate", "verdict", "lease", "presence", "announcement"),
)
def test_a_record_over_its_limit_is_refused_by_its_length(
    kind: str, read: Callable[[bytes], object], limit: int
) -> None:
    def refusal(size: int) -> str:
        with pytest.raises(Rejected) as refused:
            read(canonical.encode(Signed(kind, bytes(size), KEY.peer, bytes(64))))
        return refused.value.reason

    assert refusal(limit + RECORD_OVERHEAD) == "size"
    assert refusal(limit) == "signature"
