"""Activation codecs: what comes back, in how many bytes, and without a copy."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pmodel.domain.errors import InvalidInput
from p2pmodel.tensors import codecs
from p2pmodel.tensors.codecs import CODECS, DEFAULT_CODEC, Codec, get_codec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COARSE = {"int8": 0.012, "h4": 0.075}
"""The relative error of Gaussian states that is allowed."""

shapes = st.tuples(st.integers(1, 5), st.integers(1, 17))
widths = st.sampled_from([1, 3, 17, 63, 64, 65, 127, 256, 320, 576, 768, 896])


def states(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def passed(name: str, hidden: Tensor) -> Tensor:
    return get_codec(name).decode(get_codec(name).encode(hidden), *hidden.shape[1:])


def relative_error(again: Tensor, hidden: Tensor) -> float:
    return float((again - hidden).norm(dim=-1).div(hidden.norm(dim=-1)).max())


@settings(deadline=None)
@given(st.sampled_from(sorted(DTYPES)), shapes, st.integers(0, 2**32))
def test_a_codec_keeps_what_its_dtype_can_hold(name: str, shape: tuple[int, int], seed: int) -> None:
    codec, (tokens, width) = get_codec(name), shape
    hidden = states(tokens, width, seed) * 100
    body = codec.encode(hidden)
    again = codec.decode(body, tokens, width)
    assert again.shape == hidden.shape
    torch.testing.assert_close(again.float(), hidden.to(DTYPES[name]).float(), rtol=0, atol=0)
    torch.testing.assert_close(codec.decode(bytes(body), tokens, width), again, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(CODECS))
@settings(deadline=None)
@given(tokens=st.integers(1, 40), width=widths, seed=st.integers(0, 2**32))
def test_a_tokens_bytes_depend_on_it_alone(name: str, tokens: int, width: int, seed: int) -> None:
    codec, hidden = get_codec(name), states(tokens, width, seed)
    body = codec.encode(hidden)
    assert (
        len(memoryview(body)) == memoryview(body).nbytes == codec.size(tokens, width) == tokens * codec.size(1, width)
    )
    assert bytes(body) == b"".join(bytes(codec.encode(hidden[:, at : at + 1])) for at in range(tokens))
    assert bytes(body) == bytes(codec.encode(hidden))
    size = codec.size(1, width)
    last = codec.decode(bytes(body)[-size:], 1, width)
    assert torch.equal(codec.decode(bytes(body), tokens, width)[:, -1:], last)


@pytest.mark.parametrize("name", sorted(COARSE))
@settings(deadline=None)
@given(
    tokens=st.integers(1, 5), width=st.sampled_from([256, 320, 448, 576, 768, 1000, 4096]), seed=st.integers(0, 2**32)
)
def test_the_error_of_a_coarse_codec_is_bounded(name: str, tokens: int, width: int, seed: int) -> None:
    hidden = states(tokens, width, seed)
    for magnitude in (1e-20, 1.0, 1e20):
        # in float64, as the squares of such numbers leave float32's range
        error = relative_error(passed(name, hidden * magnitude).double(), (hidden * magnitude).double())
        assert error < COARSE[name]


@pytest.mark.parametrize(("name", "most"), [("int8", 1.1), ("h4", 0.6)])
def test_a_coarse_codec_is_small_at_every_usual_width(name: str, most: float) -> None:
    assert all(get_codec(name).size(1, width) <= most * width for width in range(256, 16385, 64))


@pytest.mark.parametrize("name", sorted(COARSE))
@pytest.mark.parametrize("factor", [60.0, 3000.0])
def test_outliers_do_not_drown_the_others(name: str, factor: float) -> None:
    hidden = states(50, 768)
    hidden[..., [3, 200, 767]] = torch.tensor([factor, -factor, 2 * factor])
    error = (passed(name, hidden) - hidden).abs()
    assert (error / hidden.abs().clamp(min=1)).mean() < 2 * COARSE[name]
    assert (error[..., [3, 200, 767]] <= 1e-3 * hidden.abs().amax(-1, keepdim=True)).all()


def test_an_outlier_beyond_those_that_are_kept_costs_accuracy_but_fits() -> None:
    hidden = states(20, 256)
    hidden[..., ::16] *= 1000
    assert relative_error(passed("h4", hidden), hidden) < 2 * COARSE["h4"]


@pytest.mark.parametrize("name", sorted(CODECS))
@settings(deadline=None)
@given(data=st.data(), width=widths)
def test_finite_states_come_out_finite(name: str, data: st.DataObject, width: int) -> None:
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    common, special = data.draw(numbers), data.draw(st.lists(numbers, max_size=min(width, 20)))
    hidden = torch.full((1, 2, width), common)
    hidden[0, 0, : len(special)] = torch.tensor(special)
    again = passed(name, hidden)
    assert again.isfinite().all()
    if name in COARSE:
        peak = hidden.abs().amax(-1, keepdim=True).double()
        assert ((again.double() - hidden.double()).norm(dim=-1) <= peak[..., 0] * width**0.5 * 0.1 + 1e-28).all() or (
            peak > 1e35
        ).any()


@pytest.mark.parametrize("name", sorted(CODECS))
def test_nothing_comes_out_as_nothing(name: str) -> None:
    assert torch.equal(passed(name, torch.zeros(1, 3, 256)).float(), torch.zeros(1, 3, 256))


@pytest.mark.parametrize("name", sorted(CODECS))
@settings(deadline=None, max_examples=200)
@given(data=st.data(), tokens=st.integers(1, 3), width=widths)
def test_a_hostile_body_gives_numbers_or_none(name: str, data: st.DataObject, tokens: int, width: int) -> None:
    codec = get_codec(name)
    size = codec.size(tokens, width)
    seed, fill = data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([None, 0, 1, 0x7F, 0x80, 0xFF]))
    noise = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    body = bytearray(noise.numpy().tobytes() if fill is None else bytes([fill]) * size)
    start = data.draw(st.integers(0, size - 1))
    body[start : start + 8] = data.draw(st.binary(min_size=8, max_size=8))[: size - start]
    kept = bytes(body)
    again = codec.decode(body, tokens, width)
    assert again.shape == (1, tokens, width)
    assert bytes(body) == kept
    assert again.tolist()  # every number of it can be read


def test_a_body_that_is_no_code_is_no_number() -> None:
    codec, hidden = get_codec("h4"), states(3, 256)
    body, size = bytearray(codec.encode(hidden)), codec.size(1, 256)
    body[2 * size - 33 : 2 * size] = bytes(33)
    again = codec.decode(body, 3, 256)
    assert again[0, 1].isnan().any()
    assert torch.equal(again[:, ::2], passed("h4", hidden[:, ::2]))


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_encoded(name: str, dtype: torch.dtype) -> None:
    hidden = torch.arange(-6, 6, dtype=dtype).view(1, 3, 4)
    torch.testing.assert_close(passed(name, hidden).float(), hidden.float(), rtol=0, atol=0 if name in DTYPES else 0.7)
    assert bytes(get_codec(name).encode(hidden)) == bytes(get_codec(name).encode(hidden.to(DTYPES.get(name, dtype))))


@pytest.mark.parametrize("name", sorted(CODECS))
def test_states_that_need_gradients_are_encoded_without(name: str) -> None:
    hidden = states(2, 64).requires_grad_()
    assert not passed(name, hidden).requires_grad


@pytest.mark.parametrize("name", sorted(COARSE))
def test_the_states_are_left_as_they_are(name: str) -> None:
    hidden = states(40, 256)
    before = hidden.clone()
    get_codec(name).encode(hidden)
    assert torch.equal(hidden, before)


def test_the_default_is_a_codec() -> None:
    assert get_codec(DEFAULT_CODEC).name == DEFAULT_CODEC


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
    with pytest.raises(InvalidInput, match=r"'zip'.*bf16, fp16, fp32, h4, int8"):
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
