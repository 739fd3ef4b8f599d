"""Activation codecs: what comes back, in how many bytes, and without a copy."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.tensors import codecs
from p2pmodel.tensors.codecs import CODECS, Codec, get_codec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

shapes = st.tuples(st.integers(1, 5), st.integers(1, 17))


@settings(deadline=None)
@given(st.sampled_from(sorted(CODECS)), shapes, st.integers(0, 2**32))
def test_a_codec_keeps_what_its_dtype_can_hold(name: str, shape: tuple[int, int], seed: int) -> None:
    codec, (tokens, width) = get_codec(name), shape
    hidden = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed)) * 100
    body = codec.encode(hidden)
    assert len(memoryview(body)) == memoryview(body).nbytes == codec.size(tokens, width)
    again = codec.decode(body, tokens, width)
    assert again.shape == hidden.shape
    torch.testing.assert_close(again.float(), hidden.to(DTYPES[name]).float(), rtol=0, atol=0)
    torch.testing.assert_close(codec.decode(bytes(body), tokens, width), again, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_encoded(name: str, dtype: torch.dtype) -> None:
    hidden = torch.arange(-6, 6, dtype=dtype).view(1, 3, 4)
    decoded = get_codec(name).decode(get_codec(name).encode(hidden), 3, 4)
    assert torch.equal(decoded.float(), hidden.float())


def test_a_layout_that_is_not_contiguous_is_encoded() -> None:
    hidden = torch.arange(12.0).view(1, 4, 3).transpose(1, 2)
    codec = get_codec("fp32")
    assert torch.equal(codec.decode(codec.encode(hidden), 3, 4), hidden)


def test_fp32_is_a_view_both_ways() -> None:
    hidden, codec = torch.zeros(1, 2, 3), get_codec("fp32")
    body = codec.encode(hidden)
    again = codec.decode(body, 2, 3)
    hidden[0, 1, 2] = 7.0
    assert again[0, 1, 2] == 7.0


def test_what_is_beyond_the_range_of_fp16_saturates() -> None:
    codec = get_codec("fp16")
    assert codec.decode(codec.encode(torch.tensor([[[1e6, -1e6]]])), 1, 2).tolist() == [[[65504.0, -65504.0]]]


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codec_does_not_hide_that_a_number_is_none(name: str) -> None:
    codec: Codec = get_codec(name)
    assert codec.decode(codec.encode(torch.tensor([[[float("nan")]]])), 1, 1).isnan().all()


def test_an_unknown_codec_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidInput, match=r"'zip'.*bf16, fp16, fp32"):
        get_codec("zip")


def test_an_installed_package_brings_a_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halves.py").write_text(
        "import torch\nfrom p2pmodel.tensors.codecs import PlainCodec\ncodec = PlainCodec('halves', torch.float16)\n"
    )
    info = tmp_path / "halves-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[p2pmodel.codecs]\nhalves = halves:codec\n")
    monkeypatch.syspath_prepend(tmp_path)
    codecs._installed.cache_clear()
    try:
        assert get_codec("halves").size(2, 3) == 12
    finally:
        codecs._installed.cache_clear()
        sys.modules.pop("halves", None)
