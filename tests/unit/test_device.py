"""What a node computes on: what is chosen, and what is refused in one sentence."""

import importlib.util
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel.cli.options import UNITS, parse_size
from p2pmodel.domain.errors import UsageError
from p2pmodel.engine.quantisation import require_library
from p2pmodel.node.machine.device import DTYPES, Device, choose_device, free_bytes, gpu_busy


def test_the_cpu_computes_in_fp32_unless_it_is_told() -> None:
    assert choose_device(None) == Device("cpu", "fp32", "fp32", None)
    for dtype in DTYPES:
        chosen = choose_device(None, dtype, 1 << 30)
        assert (chosen.dtype, chosen.wide, chosen.scheme, chosen.cache_memory) == (dtype, dtype, "", 1 << 30)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantised_weights_need_a_gpu(dtype: str) -> None:
    with pytest.raises(UsageError, match="needs a GPU"):
        choose_device(None, dtype)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="the library is here")
def test_quantised_weights_need_their_library() -> None:
    with pytest.raises(UsageError, match="bitsandbytes, which is not installed") as raised:
        require_library("nf4", "cuda:0")
    assert "p2pmodel[gpu]" in raised.value.hint


def test_what_is_no_dtype_and_no_gpu_is_refused() -> None:
    with pytest.raises(UsageError, match="no dtype 'fp8'"):
        choose_device(None, "fp8")
    with pytest.raises(UsageError, match="no GPU"):
        choose_device(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_free_memory_is_known() -> None:
    assert free_bytes(Device()) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_how_busy_no_gpu_is_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_busy(Device("cuda:0", "bf16", "bf16")) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where the library is not installed
    assert gpu_busy(Device("cuda:0", "bf16", "bf16")) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30),
        ("500MB", 500_000_000),
        ("1.5 GiB", 3 << 29),
        ("4096", 4096),
        ("64Mi", 64 << 20),
        ("1KiB", 1024),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_every_unit_is_read(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}B") == count * UNITS[unit]


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "2 apples", "GiB", "1e9", "2PiB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no size"):
        parse_size(text)
