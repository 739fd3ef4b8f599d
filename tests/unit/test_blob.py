"""Blobs of tensors: one byte string for one set of tensors, and nothing but Rejected for bytes that are none."""

import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.domain.errors import Rejected
from p2pmodel.domain.model import Slot
from p2pmodel.tensors import blob

LIMIT = 1 << 20
SLOTS = (Slot("a", (3,), "float32"), Slot("b", (2, 2), "float32"))
STATE = {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.arange(4.0).view(2, 2)}

dtypes = st.sampled_from(list(blob.DTYPES.values()))
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(shapes, dtypes), max_size=5).map(
    lambda specs: {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in specs.items()}
)


def framed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (3,), offsets: object = (0, 12)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@given(tensors, st.randoms())
def test_tensors_survive_in_any_order_with_the_same_bytes(state: dict[str, torch.Tensor], random: object) -> None:
    raw = blob.pack(state)
    names = list(state)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert blob.pack({name: state[name] for name in names}) == raw
    read = blob.unpack(raw, None, LIMIT)
    assert list(read) == sorted(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@given(tensors)
def test_the_format_is_safetensors(state: dict[str, torch.Tensor]) -> None:
    ours, theirs = safetensors.torch.load(blob.pack(state)), blob.unpack(safetensors.torch.save(state), None, LIMIT)
    assert ours.keys() == theirs.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(theirs[name], tensor)


def test_metadata_of_other_writers_is_ignored() -> None:
    assert list(blob.unpack(safetensors.torch.save(STATE, metadata={"format": "pt"}), SLOTS, LIMIT)) == ["a", "b"]


def test_a_blob_of_float32_is_one_vector_too() -> None:
    read = blob.unpack(blob.pack(STATE), SLOTS, LIMIT)
    assert read.flat is not None
    assert torch.equal(read.flat, torch.cat([STATE["a"], STATE["b"].flatten()]))
    assert read.places == (("a", (3,)), ("b", (2, 2)))


def test_a_part_of_the_slots_is_enough() -> None:
    assert list(blob.unpack(blob.pack({"b": STATE["b"]}), SLOTS, LIMIT)) == ["b"]


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else(raw: bytes) -> None:
    with pytest.raises(Rejected):
        blob.unpack(raw, SLOTS, LIMIT)


@given(st.data())
def test_a_blob_with_changed_bytes_is_refused_or_valid(data: st.DataObject) -> None:
    raw = bytearray(blob.pack(STATE))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = blob.unpack(bytes(raw), SLOTS, LIMIT)
    except Rejected:
        return
    assert all(bool(torch.isfinite(t).all()) and t.shape == STATE[name].shape for name, t in read.items())


@given(st.integers(0, 200))
def test_a_truncated_blob_is_refused(length: int) -> None:
    raw = blob.pack(STATE)
    with pytest.raises(Rejected):
        blob.unpack(raw[: min(length, len(raw) - 1)], SLOTS, LIMIT)


@pytest.mark.parametrize(
    "raw",
    [
        framed(b"[" * 100_000),
        framed(b'{"a":' * 100_000),
        framed([]),
        framed({"a": 1}),
        framed({"a": entry("F31")}, bytes(12)),
        framed({"a": entry(shape=[-3])}, bytes(12)),
        framed({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(12)),
        framed({"a": entry(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])}),
        framed({"a": entry(shape=[0, 1 << 65], offsets=[0, 0])}),
        framed({"a": entry(offsets=[0, 1 << 62])}, bytes(12)),
        framed({"a": entry(offsets=[4, 16])}, bytes(16)),
        framed({"a": entry()}, bytes(13)),
        framed({"a": entry(), "b": entry(offsets=[0, 12])}, bytes(12)),
        framed({"a": {**entry(), "more": 1}}, bytes(12)),
        framed(b'{"a\xff":1}'),
        (1 << 63).to_bytes(8, "little") + bytes(100),
        b"",
    ],
)
def test_malformed_headers_are_refused(raw: bytes) -> None:
    with pytest.raises(Rejected) as refused:
        blob.unpack(raw, None, LIMIT)
    assert refused.value.reason == "schema"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"c": torch.ones(3)}, "schema"),
        ({"a": torch.ones(4)}, "shape"),
        ({"a": torch.ones(3, dtype=torch.float64)}, "shape"),
        ({"a": torch.tensor([1.0, float("nan"), 1.0])}, "finite"),
        ({"a": torch.tensor([1.0, float("-inf"), 1.0])}, "finite"),
    ],
)
def test_what_the_slots_do_not_say_is_refused(state: dict[str, torch.Tensor], reason: str) -> None:
    with pytest.raises(Rejected) as refused:
        blob.unpack(blob.pack(state), SLOTS, LIMIT)
    assert refused.value.reason == reason


def test_not_finite_is_refused_in_every_floating_dtype() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        with pytest.raises(Rejected, match="finite"):
            blob.unpack(blob.pack({"x": torch.tensor([float("inf")], dtype=dtype)}), None, LIMIT)


def test_the_limit_comes_first() -> None:
    with pytest.raises(Rejected) as refused:
        blob.unpack(b"\xff" * 101, None, 100)
    assert refused.value.reason == "size"


def test_data_that_is_not_aligned_is_read() -> None:
    data = b"\x07" + torch.tensor([1.5]).numpy().tobytes()
    read = blob.unpack(framed({"z": entry("U8", [1], [0, 1]), "a": entry("F32", [1], [1, 5])}, data), None, LIMIT)
    assert float(read["a"]) == 1.5
    assert int(read["z"]) == 7


def test_complex_numbers_are_not_packed() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        blob.pack({"a": torch.ones(1, dtype=torch.complex64)})


@pytest.mark.parametrize("before", [0, 1])
def test_a_mapped_blob_is_the_same_wherever_it_lies_in_its_file(tmp_path: Path, before: int) -> None:
    state = {"codes": torch.arange(9, dtype=torch.uint8), "scales": torch.rand(3), "unit": torch.rand(1).double()}
    for tensors in (state, STATE):
        raw = blob.pack(tensors)
        (tmp_path / "file").write_bytes(b"-" * before + raw)
        found = blob.unpack(blob.mapped(tmp_path / "file")[before:], None, LIMIT)
        assert blob.pack(found) == raw
        found["scales" if tensors is state else "a"].zero_()
        assert (tmp_path / "file").read_bytes() == b"-" * before + raw


def test_what_is_packed_is_aligned_and_another_header_is_not() -> None:
    raw = blob.pack(STATE)
    length = int.from_bytes(raw[:8], "little")
    shifted = (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    assert blob.pack(blob.unpack(shifted, SLOTS, LIMIT)) == raw
    assert blob.is_aligned(raw)
    assert not blob.is_aligned(shifted)
    assert blob.is_aligned(b"nonsense")


def test_a_file_of_any_name_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"no utf-8: \xff")
    path.write_bytes(blob.pack(STATE))
    assert blob.unpack(blob.mapped(path), SLOTS, LIMIT).keys() == STATE.keys()
    with pytest.raises(OSError, match="No such file"):
        blob.mapped(tmp_path / "nothing")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux what is held")
def test_what_is_mapped_is_not_held(tmp_path: Path) -> None:
    size = 32 << 20
    (tmp_path / "file").write_bytes(blob.pack({"a": torch.ones(size // 4)}))
    before = held()
    mapped = blob.unpack(blob.mapped(tmp_path / "file"), None, 2 * size)
    assert held() - before < size // 4
    read = blob.unpack((tmp_path / "file").read_bytes(), None, 2 * size)
    assert held() - before >= size
    assert torch.equal(mapped["a"], read["a"])


def held() -> int:
    """Bytes of memory that are of no file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
