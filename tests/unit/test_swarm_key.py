"""The key of a private swarm, as a file and as passes."""

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.errors import InvalidInput, NotFound, Rejected, UsageError
from p2pmodel.domain.ids import PeerId
from p2pmodel.store.home import Home
from p2pmodel.store.secrets import read_swarm_key, write_secret
from p2pmodel.swarm.membership import HELLO_BYTES, Membership
from p2pmodel.wire.signing import Key
from p2pmodel.wire.swarm_key import PASS_BYTES, SwarmKey

A, B, C = (Key.generate().peer for _ in range(3))
KEY, OTHER = SwarmKey(bytes(32)), SwarmKey(b"\1" * 32)


@given(st.binary(min_size=32, max_size=32))
def test_a_key_survives_its_file(secret: bytes) -> None:
    key = SwarmKey(secret)
    again = SwarmKey.from_text(key.to_text(), "file")
    assert (again.fingerprint, again.gossip_psk()) == (key.fingerprint, key.gossip_psk())
    assert secret.hex() not in (key.fingerprint, key.gossip_psk().hex())


def test_the_file_is_that_of_other_tools() -> None:
    assert KEY.to_text() == b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"00" * 32 + b"\n"
    assert SwarmKey.from_text(KEY.to_text().replace(b"\n", b"\r\n"), "file").fingerprint == KEY.fingerprint


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is not a swarm key"),
        (b"secret", "is not a swarm key"),
        (b"/key/swarm/psk/1.0.0/\n/base64/\n" + b"A" * 43, "is not a swarm key"),
        (b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"00" * 31, "64 hexadecimal digits"),
        (b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"0x" * 32, "64 hexadecimal digits"),
        (KEY.to_text() + b"\n" * 2000, "is not a swarm key"),
        (b"\xff" * 100, "is not a swarm key"),
    ],
    ids=["empty", "text", "base64", "short", "no digits", "long", "binary"],
)
def test_what_is_no_key_is_one_sentence(raw: bytes, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        SwarmKey.from_text(raw, "the.key")


def test_a_key_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    with pytest.raises(NotFound, match="swarm-key new"):
        read_swarm_key(path)
    with pytest.raises(NotFound):
        read_swarm_key(tmp_path)
    write_secret(path, KEY.to_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_swarm_key(path).fingerprint == KEY.fingerprint
    with pytest.raises(UsageError, match="there already"):
        write_secret(path, OTHER.to_text())
    for mode in (0o604, 0o660, 0o602):
        path.chmod(mode)
        with pytest.raises(InvalidInput, match="other users"):
            read_swarm_key(path)


def test_a_home_finds_the_key_by_option_environment_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home.open(tmp_path / "home")
    for name, key in (("one", SwarmKey.generate()), ("two", KEY), ("three", OTHER)):
        write_secret(home.path / name, key.to_text())
    assert home.swarm_key() is None
    (home.path / "config.toml").write_text('swarm_key = "three"')
    found = home.swarm_key()
    assert found
    assert found.fingerprint == OTHER.fingerprint
    monkeypatch.setenv("P2PMODEL_SWARM_KEY", str(home.path / "two"))
    found = home.swarm_key()
    assert found
    assert found.fingerprint == KEY.fingerprint
    found = home.swarm_key(home.path / "one")
    assert found
    assert found.fingerprint not in (KEY.fingerprint, OTHER.fingerprint)
    monkeypatch.delenv("P2PMODEL_SWARM_KEY")
    (home.path / "config.toml").write_text("swarm_key = 3")
    with pytest.raises(InvalidInput, match=r"config\.toml"):
        home.swarm_key()


def test_a_pass_is_good_for_one_caller_one_called_one_protocol_and_one_role() -> None:
    peers = (A, B, C)
    passes = {
        (role, protocol, x, y): getattr(key, f"{role}_pass")(protocol, x, y)
        for key in (KEY,)
        for role in ("call", "answer")
        for protocol in ("p", "q")
        for x in peers
        for y in peers
    }
    assert len(set(passes.values())) == len(passes)
    assert OTHER.call_pass("p", A, B) not in passes.values()


def test_members_know_each_other_and_nobody_else() -> None:
    a, b = Membership(KEY, A), Membership(KEY, B)
    hello = a.hello("p", B)
    assert len(hello) == HELLO_BYTES
    assert len(b.answer(hello, "p", A)) == PASS_BYTES
    response = b.seal_response(b"yes", "p", A)
    assert a.open_response(response, "p", B) == b"yes"
    assert b.answer(a.hello("p", B), "p", A) == b"", "who is known is asked for nothing more"
    for stranger, protocol in ((C, "p"), (A, "q")):
        with pytest.raises(Rejected):
            b.answer(hello, protocol, stranger)
    for wrong in (Membership(OTHER, A), Membership(None, A)):
        with pytest.raises(Rejected):
            b.open_request(wrong.seal_request(b"give me", "p", B), "p", A)


@given(st.binary(max_size=200))
def test_nothing_made_up_is_let_in(raw: bytes) -> None:
    member = Membership(KEY, B)
    with pytest.raises(Rejected):
        member.open_request(raw, "p", A)
    with pytest.raises(Rejected):
        member.answer(raw[:HELLO_BYTES], "p", A)


def test_without_a_key_nothing_is_added() -> None:
    a: Membership = Membership(None, PeerId(A))
    assert (a.hello("p", B), a.seal_request(b"x", "p", B), a.open_response(b"y", "p", B)) == (b"", b"x", b"y")
