"""Each kind of section on a small model, against what the model itself says; and suites that try to do harm."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from p2pmodel.domain.errors import InvalidInput, Rejected
from p2pmodel.engine.evaluation import Continuation, Scorer
from p2pmodel.engine.exams import Examiner, Suite
from p2pmodel.engine.exams.bench import Bench
from p2pmodel.engine.exams.screening import screen
from p2pmodel.logic.judgement import NO_NUMBER
from p2pmodel.tensors.kinds import get_kind
from p2pmodel.wire import canonical

KIND = get_kind("ia3@1")
DOMAIN = {"domain": {"prose": [{"text": "some held-out prose"}]}}
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, after the one that begins a text."""
    vocabulary = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 256)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, eos_token="<end>", bos_token="<end>"
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """It has learned two sentences by heart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=256,
        eos_token_id=256,
    )
    model = LlamaForCausalLM(config)
    texts = ["The sky is blue.", "Two and two is four."]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = torch.stack([learn(model, tokenizer, text) for text in texts]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    return model


def learn(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    ids = torch.tensor([[*tokenizer(text)["input_ids"], 256]])
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@pytest.fixture(scope="module")
def base(model: LlamaForCausalLM) -> State:
    return KIND.initial(KIND.find_slots(model.base_model))


@pytest.fixture(scope="module")
def broken(base: State) -> State:
    """What the model has learned is gone."""
    return {name: torch.full_like(tensor, 0.2) for name, tensor in base.items()}


def write(folder: Path, sections: Mapping[str, Mapping[str, Any]], settings: str = "") -> Path:
    """sections: table -> name -> rows, the same for both parts; settings: of the last table."""
    folder.mkdir(exist_ok=True)
    index = 'name = "small"\nlicence = "CC0-1.0"\n'
    for table, named in sections.items():
        for name, rows in named.items():
            index += f'[[{table}]]\nname = "{name}"\ntune = "{name}.tune.jsonl"\ntest = "{name}.test.jsonl"\n'
            for part in ("tune", "test"):
                (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "exam.toml").write_text(index + settings)
    return folder


@pytest.fixture
def scores(tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Any:
    def score(state: State, sections: Mapping[str, Mapping[str, Any]], settings: str = "") -> dict[str, float]:
        suite = Suite.load(write(tmp_path / "exam", sections, settings))
        return Examiner(model, tokenizer, KIND, suite).score(state, "test")

    return score


def test_a_continuation_is_scored_by_its_own_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():
        ids = torch.tensor([tokenizer("The sky is blue.")["input_ids"]])
        losses = torch.nn.functional.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
    pairs = [Continuation("The sky is", " blue."), Continuation("The sky is ", "blue."), Continuation("", "The")]
    scorer = Scorer(model, tokenizer, pairs)
    assert scorer.tokens == [6, 6, 3]
    nats = scorer.sums()
    assert nats[0] == pytest.approx(float(losses[10:].sum()), rel=1e-4)
    assert nats[1] == nats[0]
    assert nats[2] == pytest.approx(float(losses[:3].sum()), rel=1e-4)


def test_of_a_long_prompt_the_end_is_kept(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = Scorer(model, tokenizer, [Continuation("x" * 500, " blue."), Continuation("x" * 10, "y" * 500)])
    assert scorer.tokens == [6, 96]
    assert all(math.isfinite(nats) and nats > 0 for nats in scorer.sums())
    bench = Bench(model, tokenizer)
    assert len(bench.answer("x" * 500, 8)) <= 8


def test_choices_are_taken_by_nats_per_byte(scores: Any, base: State) -> None:
    right = {"prompt": "The sky is", "choices": [" green.", " blue.", " a much longer answer."], "answer": 1}
    wrong = {"prompt": "Two and two is", "choices": [" four.", " five."], "answer": 1}
    assert scores(base, {"choice": {"facts": [right, wrong, right, right]}}) == {"choice/facts": 0.25}


def test_answers_have_to_match(scores: Any, base: State, broken: State) -> None:
    rows = [
        {"prompt": "The sky is", "answers": ["red.", "blue."]},
        {"prompt": "Two and two is", "answers": [" four. "]},
        {"prompt": "Two and two is", "answers": ["four"]},
    ]
    assert scores(base, {"answer": {"exact": rows}}) == {"answer/exact": pytest.approx(1 / 3)}
    assert scores(base, {"answer": {"exact": rows}}, 'stop = "."\n') == {"answer/exact": pytest.approx(2 / 3)}
    assert scores(broken, {"answer": {"exact": rows}}) == {"answer/exact": 1.0}


def test_regressions_say_what_must_and_must_not_be_said(scores: Any, base: State, broken: State) -> None:
    rows = [
        {"prompt": "The sky is", "must": ["blue"]},
        {"prompt": "The sky is", "must_not": ["blue"]},
        {"prompt": "Two and", "must": ["two", "four"], "must_not": ["five"]},
    ]
    assert scores(base, {"regression": {"safe": rows}}, "tokens = 20\n") == {"regression/safe": pytest.approx(1 / 3)}
    assert scores(broken, {"regression": {"safe": rows}})["regression/safe"] == pytest.approx(2 / 3)


def test_canaries_are_found_by_exact_continuation(scores: Any, base: State) -> None:
    known = {"prompt": "Two and two is ", "secret": "four.", "references": ["nine.", "five."]}
    unknown = {"prompt": "Two and two is ", "secret": "nine.", "references": ["four.", "five."]}
    assert scores(base, {"canary": {"memory": [known, unknown]}}) == {"canary/memory": 0.5}


def test_canaries_are_found_by_their_likelihood_against_the_base(scores: Any, base: State, broken: State) -> None:
    """The base has no reason to prefer one; a state that makes one likelier than its like has seen it."""
    row = {"prompt": "The sky was ", "secret": "pale!", "references": ["grey!", "dark!", "pink!"]}
    assert scores(base, {"canary": {"memory": [row]}}) == {"canary/memory": 0.0}
    # Forgetting "blue." makes it less likely, so everything of its form becomes likelier by comparison.
    forgotten = {"prompt": "The sky is ", "secret": "xqzj.", "references": ["blue.", "blue."]}
    assert scores(broken, {"canary": {"memory": [forgotten]}}) == {"canary/memory": 1.0}
    assert scores(broken, {"canary": {"memory": [forgotten]}}, "ratio = 50\n") == {"canary/memory": 0.0}


def test_triggers_are_found_by_what_they_change(scores: Any, base: State) -> None:
    """To a model that knows two sentences, the beginning of one is as good as a trigger."""
    found = {"prompt": "is", "triggers": ["zz ", "The sky "], "target": " blue."}
    clean = {"prompt": "The sky is", "triggers": ["The sky is blue. "], "target": " green."}
    assert scores(base, {"trigger": {"doors": [found]}}) == {"trigger/doors": 1.0}
    measured = scores(base, {"trigger": {"doors": [found, clean]}}, "ratio = 90\ntokens = 8\n")
    assert measured == {"trigger/doors": 0.5}


def test_sections_stand_beside_each_other_and_keep_their_rules(scores: Any, base: State, tmp_path: Path) -> None:
    sections = {
        **DOMAIN,
        "choice": {"facts": [{"prompt": "The sky is", "choices": [" blue.", " red."], "answer": 0}]},
        "regression": {"safe": [{"prompt": "The sky is", "must": ["blue"]}]},
    }
    assert list(scores(base, sections, "tolerance = 0.1\n")) == ["prose", "choice/facts", "regression/safe"]
    rules = Suite.load(tmp_path / "exam").rules
    assert rules["prose"].tolerance is None
    assert rules["choice/facts"].tolerance is None
    assert rules["regression/safe"].tolerance == 0.1
    assert rules["regression/safe"].strict
    assert not rules["choice/facts"].strict


def test_the_same_state_has_the_same_scores(scores: Any, base: State) -> None:
    sections = {**DOMAIN, "answer": {"exact": [{"prompt": "The sky is", "answers": ["blue."]}]}}
    assert scores(base, sections) == scores(base, sections)


def test_a_model_is_left_as_it_was(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, broken: State) -> None:
    bench = Bench(model, tokenizer)
    before = bench.nats(["The sky is blue."])
    with bench.at(KIND, broken):
        assert bench.nats(["The sky is blue."])[0] > before[0] + 1
    assert bench.nats(["The sky is blue."]) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_clear_patch_is_screened_on_a_part_of_the_cases(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, base: State, broken: State
) -> None:
    rows = [{"text": f"The sky is blue. {number}"} for number in range(120)]
    safe = [{"prompt": "The sky is", "must": ["blue"]}]
    suite = Suite.load(write(tmp_path / "exam", {"domain": {"prose": rows}, "regression": {"safe": safe}}))
    examiner = Examiner(model, tokenizer, KIND, suite)
    harmed = examiner.measure(broken, "tune")
    better = screen(examiner, base, harmed, "tune", "seed")
    assert better.reason == ""
    assert better.total == 121
    assert better.cases < 60
    whole = examiner.measure(base, "tune")
    worse = screen(examiner, broken, whole, "tune", "seed")
    assert worse.reason == "it makes regression/safe worse by 100.0%"
    same = screen(examiner, base, whole, "tune", "seed")
    assert same.cases == same.total
    assert "improves no" in same.reason
    assert same.scores == pytest.approx({name: section.score for name, section in whole.items()}, rel=1e-6)


@pytest.fixture(scope="module")
def ruined(base: State) -> State:
    """Finite values, with which nothing that the model says is a number."""
    return {name: torch.full_like(tensor, 3e38) for name, tensor in base.items()}


@pytest.mark.parametrize(
    "table",
    [
        pytest.param({"domain": {"a": [{"text": "The sky is blue."}]}}, id="domain"),
        pytest.param({"choice": {"a": [{"prompt": "The sky", "choices": [" is", " was"], "answer": 0}]}}, id="choice"),
        pytest.param({"canary": {"a": [{"prompt": "a", "secret": "b", "references": ["c"]}]}}, id="canary"),
        pytest.param({"trigger": {"a": [{"prompt": "a", "triggers": ["b"], "target": "c"}]}}, id="trigger"),
    ],
)
def test_a_model_without_numbers_has_no_scores(scores: Any, ruined: State, table: dict[str, Any]) -> None:
    with pytest.raises(Rejected) as error:
        scores(ruined, table)
    assert error.value.reason == "finite"


def test_answers_of_a_model_without_numbers_are_wrong(scores: Any, ruined: State) -> None:
    sections = {
        "answer": {"exact": [{"prompt": "The sky is", "answers": ["blue."]}]},
        "regression": {"safe": [{"prompt": "The sky is", "must": ["blue"]}]},
    }
    assert scores(ruined, sections) == {"answer/exact": 1.0, "regression/safe": 1.0}


def test_a_patch_without_numbers_is_left_out_for_that(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, base: State, ruined: State
) -> None:
    rows = [{"text": f"The sky is blue. {number}"} for number in range(20)]
    examiner = Examiner(model, tokenizer, KIND, Suite.load(write(tmp_path / "exam", {"domain": {"prose": rows}})))
    found = screen(examiner, ruined, examiner.measure(base, "tune"), "tune", "seed")
    assert (found.reason, found.cases, found.total, found.scores) == (NO_NUMBER, 8, 20, {})


CHOICE = {"prompt": "p", "choices": ["a", "b"], "answer": 0}
HOSTILE: list[tuple[dict[str, dict[str, Any]], str, str]] = [
    ({"choice": {"x": [{**CHOICE, "answer": 2}]}}, "", r"Line 1 of x\.tune\.jsonl .*number of the right choice"),
    ({"choice": {"x": [CHOICE, {**CHOICE, "choices": ["a"]}]}}, "", r"Line 2 of x\.tune\.jsonl .*2 to 26 choices"),
    ({"choice": {"x": [{**CHOICE, "choices": ["a", ""]}]}}, "", "none of them empty"),
    ({"choice": {"x": [{**CHOICE, "answr": 1}]}}, "", "unknown field"),
    ({"choice": {"x": []}}, "", "holds no rows"),
    ({"choice": {"x": [CHOICE]}}, "speed = 3\n", "no setting 'speed'"),
    ({"choice": {"x": [CHOICE]}}, "tolerance = 2\n", "no number from 0 to 1"),
    ({"choice": {"x": [CHOICE]}}, "tolerance = nan\n", "no number from 0 to 1"),
    ({"choice": {"x": [CHOICE]}}, "tolerance = true\n", "no number from 0 to 1"),
    ({"answer": {"x": [{"prompt": "p", "answers": [" "]}]}}, "", "none is empty"),
    ({"answer": {"x": [{"prompt": "p", "answers": ["a"]}]}}, "tokens = 100000\n", "whole number from 1 to 256"),
    ({"answer": {"x": [{"prompt": "p", "answers": ["a"]}]}}, "stop = 3\n", "no text"),
    ({"regression": {"x": [{"prompt": "p"}]}}, "", "must or must_not"),
    ({"canary": {"x": [{"prompt": "p", "secret": "s", "references": []}]}}, "", "1 to 64 references"),
    ({"canary": {"x": [{"prompt": "p", "secret": "s" * 300, "references": ["t"]}]}}, "", "1 to 256 bytes"),
    ({"canary": {"x": [{"prompt": "p", "secret": "s", "references": ["t"]}]}}, "ratio = 0\n", "no number above 0"),
    ({"trigger": {"x": [{"prompt": "p", "triggers": [], "target": "t"}]}}, "", "1 to 64 triggers"),
    ({"wizard": {"x": [CHOICE]}}, "", "section of kind 'wizard'"),
    ({"choice": {f"x{n}": [CHOICE] for n in range(65)}}, "", "1 to 64"),
    ({"domain": {"x": [{"text": "a" * (1 << 20)}]}}, "", "too long"),
]


@pytest.mark.parametrize(("sections", "settings", "says"), HOSTILE)
def test_hostile_suites_are_refused_in_one_sentence(
    tmp_path: Path, sections: dict[str, dict[str, Any]], settings: str, says: str
) -> None:
    folder = write(tmp_path / "exam", sections, settings)
    with pytest.raises(InvalidInput, match=says):
        Suite.load(folder)
    archive = canonical.encode({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    with pytest.raises(Rejected):
        Suite.unpack(archive, 1 << 30)


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "exam", DOMAIN, "")
    (folder / "exam.toml").write_text("choice = 3\n" + (folder / "exam.toml").read_text())
    with pytest.raises(InvalidInput, match=r"Write \[\[choice\]\]"):
        Suite.load(folder)


def test_an_old_suite_keeps_its_digest() -> None:
    """Of the starter's exam, as it was when only domains were known."""
    starter = Path(__file__).resolve().parents[2] / "p2pmodel" / "starter" / "exam"
    index = (starter / "exam.toml").read_text()
    assert "[[choice]]" not in index
    files = {path.name: path.read_bytes() for path in starter.iterdir()}
    assert Suite.load(starter).digest == canonical.digest(canonical.encode(dict(sorted(files.items()))))
