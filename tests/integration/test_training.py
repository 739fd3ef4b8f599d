"""Exams and evaluation of a small model and of what was trained of it, from texts to scores."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.engine.data import Parts
from p2pmodel.engine.evaluation import Scorer, attached, evaluate
from p2pmodel.engine.exams import Examiner, Suite, search_alpha
from p2pmodel.engine.training.recipes import TrainingOptions
from p2pmodel.tensors.blob import pack
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.tensors.merging import Contribution, apply_update, get_strategy
from p2pmodel.wire import canonical
from tests.support.training import PROSE, byte_tokenizer, prose_parts, small_model, trained_patch

KIND = get_kind("ia3@1")
OPTIONS = TrainingOptions(steps=12, batch=4, sequence=32, learning_rate=0.1, fisher_examples=8, checkpoint_every=5)
STARTER = Path(__file__).resolve().parents[2] / "p2pmodel" / "starter"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return small_model()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Parts:
    return prose_parts(tmp_path_factory.mktemp("texts"), tokenizer)


@pytest.fixture(scope="module")
def parent(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return KIND.initial(KIND.find_slots(model.base_model))


@pytest.fixture
def exam(tmp_path: Path) -> Path:
    folder = tmp_path / "exam"
    folder.mkdir()
    index = ""
    for name, text in (("prose", PROSE), ("numbers", "1 2 3 4 5 6 7 8 9 "), ("long", PROSE * 3)):
        index += f'[[domain]]\nname = "{name}"\ntune = "{name}.tune.jsonl"\ntest = "{name}.test.jsonl"\n'
        rows = [{"source": "x", "text": text}, {"source": "y", "text": text[5:]}]
        for part in ("tune", "test"):
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "exam.toml").write_text(f'name = "small"\nlicence = "CC0-1.0"\n{index}')
    return folder


def test_two_contributors_merge_to_something_better(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    parent: dict[str, torch.Tensor],
    exam: Path,
    parts: Parts,
) -> None:
    examiner = Examiner(model, tokenizer, KIND, Suite.load(exam))
    given = []
    for seed in (1, 2):
        patch = trained_patch(model, parent, parts, dataclasses.replace(OPTIONS, seed=seed))
        given.append(Contribution(canonical.digest(pack(patch.adapter)), patch.adapter, patch.fisher, 1.0))
    given.sort(key=lambda contribution: contribution.patch)
    update = get_strategy("fisher@1").combine(parent, given, {})
    alpha = search_alpha(lambda a: examiner.score(apply_update(parent, update, a), "tune")["prose"])
    merged = examiner.score(apply_update(parent, update, alpha), "test")
    assert merged["prose"] < examiner.score(parent, "test")["prose"]


def test_scores_are_nats_per_byte_of_the_texts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, parent: dict[str, torch.Tensor], exam: Path
) -> None:
    """Against the model's own loss, one text at a time; the long ones are cut at the context of 64 tokens."""
    scores = Examiner(model, tokenizer, KIND, Suite.load(exam)).score(parent, "test")
    assert list(scores) == ["prose", "numbers", "long"]
    nats, size = 0.0, 0
    for text in (PROSE * 3, (PROSE * 3)[5:]):
        ids = torch.tensor([[256, *tokenizer(text)["input_ids"]]])
        size += ids.shape[1] - 1
        for at in range(0, ids.shape[1] - 1, 64):
            window = ids[:, at : at + 65]
            with torch.no_grad():
                logits = model(input_ids=window[:, :-1]).logits
            nats += float(torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction="sum"))
    assert scores["long"] == pytest.approx(nats / size, rel=1e-5)


def test_evaluation_counts_tokens_and_bytes(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, parent: dict[str, torch.Tensor]
) -> None:
    result = evaluate(model, tokenizer, KIND, parent, ["abcé", "x"])
    assert (result.tokens, result.bytes) == (6, 6)
    assert result.nats_per_byte == result.nats_per_token > 0
    with pytest.raises(InvalidInput):
        evaluate(model, tokenizer, KIND, parent, [""])


def test_the_first_token_is_not_predicted_without_a_start(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, parent: dict[str, torch.Tensor]
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)  # type: ignore[no-untyped-call]
    scorer = Scorer(model, bare, ["ab", "a", ""])
    assert scorer.tokens == [1, 0, 0]
    with attached(model, KIND, parent) as applier:
        nats = scorer.nats(applier, parent)
    assert nats[0] > 0
    assert nats[1:] == [0.0, 0.0]


def test_a_suite_travels(exam: Path) -> None:
    suite = Suite.load(exam)
    (exam / "notes.txt").write_text("not part of it")
    raw = suite.pack()
    assert Suite.load(exam).pack() == raw
    again = Suite.unpack(raw, 1 << 20)
    assert again.domains == suite.domains
    assert again.pack() == raw
    assert (again.name, again.licence) == ("small", "CC0-1.0")
    with pytest.raises(Rejected):
        Suite.unpack(raw, 100)


def test_the_starters_exam_is_valid() -> None:
    suite = Suite.load(STARTER / "exam")
    assert len(suite.domains) == 6
    assert all(len(d.test) > len(d.tune) > 0 for d in suite.domains)


@pytest.mark.parametrize(
    ("replace", "by", "says"),
    [
        ('"prose.tune.jsonl"', '"../secret.jsonl"', "no plain file name"),
        ('"prose.tune.jsonl"', '"/etc/passwd.jsonl"', "no plain file name"),
        ('"prose.tune.jsonl"', '"exam.toml"', "ends in .jsonl"),
        ('"prose.tune.jsonl"', '"absent.jsonl"', "is not there"),
        ('tune = "prose.tune.jsonl"', "", "lacks"),
        ('name = "numbers"', 'name = "prose"', "twice"),
        ('name = "numbers"', 'name = "a/b"', "no name"),
        ("[[domain]]", "[domain", "not valid TOML"),
    ],
)
def test_a_wrong_exam_is_refused_in_one_sentence(exam: Path, replace: str, by: str, says: str) -> None:
    index = (exam / "exam.toml").read_text()
    (exam / "exam.toml").write_text(index.replace(replace, by, 1))
    (exam.parent / "secret.jsonl").write_text('{"text": "secret"}\n')
    with pytest.raises(InvalidInput, match=says):
        Suite.load(exam)
    files = {path.name: path.read_bytes() for path in exam.iterdir()}
    with pytest.raises(Rejected) as refused:
        Suite.unpack(canonical.encode(files), 1 << 20)
    assert refused.value.reason == "schema"


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b'{"source": "x"}\n', b"[1]\n", b"\xff\n", b'{"text": ""}\n', b"[" * 100_000]
)
def test_rows_without_text_are_refused(exam: Path, content: bytes) -> None:
    (exam / "prose.test.jsonl").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"prose\.test\.jsonl"):
        Suite.load(exam)


def test_a_link_out_of_the_folder_is_not_followed(exam: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    (exam / "prose.test.jsonl").unlink()
    (exam / "prose.test.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(InvalidInput, match="is not there"):
        Suite.load(exam)


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\x81\xa1a\x01", canonical.encode({"exam.toml": b"\xff"})])
def test_random_archives_are_refused(raw: bytes) -> None:
    with pytest.raises(Rejected):
        Suite.unpack(raw, 1 << 20)


@pytest.mark.parametrize("best", [0.1, 0.3, 0.75, 1.0, 1.3, 1.9, 2.6, 3.5, 9.0])
def test_alpha_is_found_in_few_evaluations(best: float) -> None:
    asked: list[float] = []

    def score(alpha: float) -> float:
        asked.append(alpha)
        return 1.2 + 0.03 * (alpha - best) ** 2

    alpha = search_alpha(score)
    assert alpha == pytest.approx(min(best, 4.0), abs=0.1)
    assert alpha * 16 == round(alpha * 16)
    assert len(asked) == len(set(asked)) <= 6


def test_alpha_is_found_where_nothing_is_a_parabola() -> None:
    assert search_alpha(lambda alpha: alpha) <= 0.25
    assert 0 < search_alpha(lambda alpha: 0.0) <= 4


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.8), (0.0, 1.5), (0.4, 3.0), (0.9, 9.0), (0.0, 0.3)])
def test_a_scale_that_gives_no_numbers_is_worse_than_all_others(low: float, high: float) -> None:
    def score(alpha: float) -> float:
        if not low < alpha < high:
            raise Rejected("finite", "The merge is not finite.")
        return (alpha - 2) ** 2

    assert low < search_alpha(score) < high


@pytest.mark.parametrize("reason", ["finite", "shape"])
def test_where_no_scale_gives_numbers_there_is_none(reason: str) -> None:
    def score(alpha: float) -> float:
        raise Rejected(reason, "It cannot be scored.")

    with pytest.raises(Rejected) as error:
        search_alpha(score)
    assert error.value.reason == reason
