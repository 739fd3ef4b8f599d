"""Users' data: what is refused, in one sentence, and how the rest is encoded, cut, packed and split."""

import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pmodel import starter
from p2pmodel.domain.errors import InvalidInput
from p2pmodel.engine.checkpoint import load_tokenizer
from p2pmodel.engine.data import IGNORED, Blocks, Corpus, TextFile, corpus, load, read_texts, rows, split
from p2pmodel.engine.data.encoding import Answer, encode_answers, encode_prompt
from p2pmodel.engine.data.packing import answer_blocks, text_blocks
from p2pmodel.engine.data.rows import Chat, Completion, Text, parse
from p2pmodel.wire import canonical
from tests.support.training import CHAT_TEMPLATE, END, byte_tokenizer

TOKENIZER = byte_tokenizer(template=CHAT_TEMPLATE)
BARE = byte_tokenizer(eos=False)


def test_a_prompt_is_what_its_tokenizer_makes_of_it() -> None:
    """Some have a token that begins texts, and put none there: their models have not learned it."""
    starters = load_tokenizer(starter.MODEL)
    for tokenizer in (TOKENIZER, BARE, starters):
        assert encode_prompt(tokenizer, "def f") == tokenizer("def f")["input_ids"]
    assert encode_prompt(starters, "def f")[0] == starters.bos_token_id
    assert encode_prompt(starters, "") == [starters.bos_token_id]
    assert encode_prompt(TOKENIZER, "") == [END]
    assert encode_prompt(BARE, "") == []


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(count: int) -> Corpus:
    """`count` tokens of text."""
    return Corpus(texts=array("i", [at % 251 for at in range(count)]))


def answer(prompt: int, length: int, first: int = 0) -> Answer:
    return Answer(array("i", range(first, first + prompt + length)), bytes([0] * prompt + [1] * length))


def learned_text(example: Completion | Chat) -> str:
    """What is learned of it, with | for the end of a text."""
    encoded = encode_answers(TOKENIZER, example)
    ids = [i for i, learned in zip(encoded.ids, encoded.learned, strict=True) if learned]
    text = TOKENIZER.decode(ids)
    assert isinstance(text, str)
    return text.replace("<end>", "|")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "nothing but blanks"),
        (b"abc\x00def", "not a UTF-8 text"),
        (b"\xff\xfe\x00a", "not a UTF-8 text"),
        ("ä".encode("latin-1"), "not a UTF-8 text"),
    ],
)
def test_files_that_are_no_texts_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "f.txt").write_bytes(content)
    with pytest.raises(InvalidInput, match=says) as refused:
        read_texts([tmp_path / "f.txt"])
    assert refused.value.message.startswith("f.txt ")
    assert refused.value.hint


def test_missing_files_folders_and_nothing_are_refused(tmp_path: Path) -> None:
    for paths, says in (([tmp_path / "no.txt"], "does not exist"), ([tmp_path], "is a folder"), ([], "No text files")):
        with pytest.raises(InvalidInput, match=says):
            read_texts(paths)
    for path in (tmp_path / "no.jsonl", tmp_path / "no.parquet"):
        with pytest.raises(InvalidInput, match="does not exist"):
            load([path], TOKENIZER)
    with pytest.raises(InvalidInput, match="No data files"):
        load([], TOKENIZER)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("text")
    (tmp_path / "f.txt").chmod(0)
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_texts([tmp_path / "f.txt"])


def test_a_text_is_read_with_its_digest(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfwith a mark\n"
    (tmp_path / "f.txt").write_bytes(raw)
    assert read_texts([tmp_path / "f.txt"]) == [TextFile("f.txt", canonical.digest(raw), len(raw), "with a mark\n")]


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"text": "a"}, Text("a")),
        ({"text": "a", "id": 3, "prompt": None}, Text("a")),
        ({"prompt": "", "completion": "b", "text": "c"}, Completion("", "b")),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "prompt": "q"},
            Chat((("user", "q"), ("assistant", "a"))),
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "unanswered"}]},
            Chat((("assistant", "a"),)),
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": t} for t in "ab"]}]},
            Chat((("assistant", "ab"),)),
        ),
    ],
)
def test_rows_are_told_by_their_columns(row: Any, example: Any) -> None:
    assert parse(row) == example


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "no object"),
        (3, "no object"),
        ({}, "has none of"),
        ({"text": " \n"}, "empty text"),
        ({"text": 3}, "text that is no text"),
        ({"text": "a\0b"}, "NUL"),
        ({"prompt": "a"}, "no completion"),
        ({"completion": "a"}, "no prompt"),
        ({"prompt": "a", "completion": " "}, "empty completion"),
        ({"prompt": ["a"], "completion": "b"}, "prompt that is no text"),
        ({"messages": "hello"}, "no list"),
        ({"messages": []}, "no list"),
        ({"messages": ["hello"]}, "without role and content"),
        ({"messages": [{"role": "assistant"}]}, "no content"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "content that is no text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": 3}]}]}, "text that is no text"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "calls tools"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no message of the role assistant"),
        ({"messages": [{"role": "assistant", "content": "  "}]}, "no message of the role assistant"),
        ({"messages": [{"role": "user", "content": "q"}] * 1025}, "no list of 1 to"),
    ],
)
def test_rows_that_cannot_be_learned_from_say_why(row: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(row)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["text", "prompt", "completion", "messages", "role", "content"]) | st.text(), x
            )
        ),
    )
)
def test_any_row_is_an_example_or_a_sentence(row: Any) -> None:
    try:
        example: object = parse(row)
    except ValueError as error:
        example = str(error)
    assert isinstance(example, Text | Completion | Chat) or str(example).startswith(("has ", "is "))


def test_broken_lines_are_named_and_counted(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", {"text": "x" * 40}, "{", "", {"txt": 1}, '"text"', "\x80", {"text": "y" * 40})
    with pytest.raises(InvalidInput) as refused:
        load([path], TOKENIZER)
    assert refused.value.message == (
        "d.jsonl has 4 broken lines: line 2 is not valid JSON; line 4 has none of messages, prompt and completion, "
        "text; line 5 is no object with named columns; and 1 more."
    )
    assert "--skip-broken" in refused.value.hint
    found = load([path], TOKENIZER, skip_broken=True)
    (source,) = found.sources
    assert (source.examples, source.skipped) == (2, 4)
    assert source.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.size == path.stat().st_size
    assert list(found.texts) == [END, *TOKENIZER("x" * 40)["input_ids"], END, *TOKENIZER("y" * 40)["input_ids"], END]


def test_one_broken_line_reads_well(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"d\.jsonl has 1 broken line: line 1 is not valid JSON\."):
        load([lines(tmp_path / "d.jsonl", "[" * 10_000)], TOKENIZER)


def test_a_json_file_is_an_array_of_rows_or_lines(tmp_path: Path) -> None:
    some: list[object] = [{"text": "x" * 40}, {"text": "y" * 40}]
    as_lines = load([lines(tmp_path / "lines.jsonl", *some)], TOKENIZER)
    for name, content in (("a", "\ufeff\n " + json.dumps(some, indent=1)), ("b", "\n".join(map(json.dumps, some)))):
        path = tmp_path / f"{name}.json"
        path.write_text(content)
        found = load([path], TOKENIZER)
        assert found.texts == as_lines.texts
        assert found.sources[0].digest == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(json.dumps([*some, 3, {"text": ""}]))
    with pytest.raises(InvalidInput, match=r"has 2 broken rows: row 3 is no object with named columns; row 4 has an "):
        load([path], TOKENIZER)
    path.write_text("[{")
    with pytest.raises(InvalidInput, match=r"b\.json is not valid JSON\."):
        load([path], TOKENIZER)


def test_a_set_that_is_empty_after_all_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"No examples are left of d\.jsonl: all 2 lines are broken\."):
        load([lines(tmp_path / "d.jsonl", "{", "{")], TOKENIZER, skip_broken=True)
    with pytest.raises(InvalidInput, match=r"No examples are left of d\.jsonl\."):
        load([lines(tmp_path / "d.jsonl", "", "")], TOKENIZER)


def test_a_line_without_end_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 1 << 10)
    path = lines(tmp_path / "d.jsonl", json.dumps({"text": "x" * 5000}), {"text": "y" * 40})
    found = load([path], TOKENIZER, skip_broken=True)
    assert (found.sources[0].examples, found.sources[0].skipped) == (1, 1)
    assert found.sources[0].digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_too_many_tokens_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_TOKENS", 100)
    for two in ([{"text": "x" * 60}] * 2, [{"prompt": "x" * 60, "completion": "y"}] * 2):
        with pytest.raises(InvalidInput, match="more than 100 tokens"):
            load([lines(tmp_path / "d.jsonl", *two)], TOKENIZER)


def test_parquet_has_the_same_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": f"q{n}", "completion": f" a{n}", "id": n} for n in range(600)]
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = load([path], TOKENIZER)
    assert found.answers == load([lines(tmp_path / "d.jsonl", *rows)], TOKENIZER).answers
    assert (found.sources[0].examples, found.sources[0].name) == (600, "d.parquet")
    assert found.sources[0].digest == hashlib.sha256(path.read_bytes()).hexdigest()
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "q", "completion": None}, *rows[:2]]), path)
    with pytest.raises(InvalidInput, match="1 broken row: row 1 has no completion"):
        load([path], TOKENIZER)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat}]), path)
    assert load([path], TOKENIZER).answers == load([lines(tmp_path / "d.jsonl", {"messages": chat})], TOKENIZER).answers
    parquet.write_table(pyarrow.Table.from_pylist([{"body": "q"}]), path)
    with pytest.raises(InvalidInput, match="none of the columns"):
        load([path], TOKENIZER)
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(InvalidInput, match="no Parquet file"):
        load([path], TOKENIZER)


def test_only_the_completion_is_learned() -> None:
    encoded = encode_answers(TOKENIZER, Completion("ask ", "tell"))
    assert list(encoded.ids) == [*TOKENIZER("ask tell")["input_ids"], END]
    assert list(encoded.learned) == [0] * 4 + [1] * 5
    assert learned_text(Completion("ask ", "tell")) == "tell|"
    alone = encode_answers(TOKENIZER, Completion("", "tell"))
    assert list(alone.learned) == [0, 1, 1, 1, 1, 1]
    assert alone.ids[0] == END
    assert list(encode_answers(BARE, Completion("", "ab")).learned) == [0, 1]


def test_only_answers_of_a_chat_are_learned_with_what_ends_them() -> None:
    turns = (("system", "be"), ("user", "one"), ("assistant", " first "), ("user", "two"), ("assistant", "last"))
    assert learned_text(Chat(turns)) == "first</>\nlast</>\n"
    assert learned_text(Chat((("assistant", "hello"),))) == "<assistant>hello</>\n"[len("<assistant>") :]
    assert learned_text(Chat((("user", "/"), ("assistant", "/")))) == "/</>\n"


def test_templates_that_write_the_last_turn_differently_work() -> None:
    """As those of models that think do."""
    thinking = byte_tokenizer(
        template="{% for m in messages %}<{{ m.role }}>"
        "{% if loop.last and m.role == 'assistant' %}[thought]{% endif %}{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = Chat((("user", "q"), ("assistant", "one"), ("user", "q"), ("assistant", "two")))
    encoded = encode_answers(thinking, chat)
    text = thinking.decode([i for i, learned in zip(encoded.ids, encoded.learned, strict=True) if learned])
    assert text == "one</>[thought]two</>"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "does not fit the chat template: roles must alternate"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not write as it is"),
    ],
)
def test_a_chat_that_its_template_refuses_is_broken(tmp_path: Path, template: str, says: str) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(InvalidInput, match=f"line 1 .*{says}"):
        load([lines(tmp_path / "d.jsonl", row)], byte_tokenizer(template=template))


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    row = {"messages": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(InvalidInput, match="no chat template"):
        load([lines(tmp_path / "d.jsonl", row)], BARE, skip_broken=True)


word = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="<>"), min_size=1, max_size=8)


@given(st.lists(st.tuples(word, word), min_size=1, max_size=4))
def test_all_of_every_answer_is_learned_and_no_question(turns: list[tuple[str, str]]) -> None:
    """Whatever they say, and even if questions repeat answers."""
    chat = [turn for question, told in turns for turn in (("user", question), ("assistant", told))]
    assert learned_text(Chat(tuple(chat))) == "".join(f"{told.strip()}</>\n" for _, told in turns)


@given(st.lists(st.text("abc é", min_size=20, max_size=60), min_size=2, max_size=4), st.integers(4, 40))
def test_blocks_predict_each_token_once(contents: list[str], sequence: int) -> None:
    stream = [END]
    for content in contents:
        stream += [*TOKENIZER(content)["input_ids"], END]
    cut = text_blocks(array("i", stream), min(sequence, (len(stream) - 1) // 2))
    width = cut.ids.shape[1] - 1
    assert cut.ids.dtype == torch.int64
    assert width <= sequence
    assert len(cut) >= 2
    assert torch.equal(cut.labels, cut.ids[:, 1:])
    targets = cut.labels.flatten().tolist()
    assert [int(cut.ids[0, 0]), *targets] == stream[: len(targets) + 1]
    assert len(stream) - 1 - len(targets) < width


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=30), st.integers(4, 16))
def test_packing_keeps_every_answer_whole_that_fits(shapes: list[tuple[int, int]], sequence: int) -> None:
    answers = [answer(prompt, length, 100 * at) for at, (prompt, length) in enumerate(shapes)]
    packed = answer_blocks(answers, sequence, packing=True)
    assert packed.ids.shape[1] <= sequence + 1
    windows = [a.window(sequence + 1) for a in answers]
    learned = sorted(i for w in windows for i, yes in zip(w.ids, w.learned, strict=True) if yes)
    assert sorted(packed.labels[packed.labels != IGNORED].tolist()) == learned
    rows = ["," + ",".join(map(str, row)) + "," for row in packed.ids.tolist()]
    for window in windows:
        assert any("," + ",".join(map(str, window.ids)) + "," in row for row in rows)
    alone = answer_blocks(answers, sequence, packing=False)
    assert len(packed) <= len(alone) == len(answers)
    assert packed.tokens == alone.tokens


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 24))
def test_a_window_shows_as_much_of_the_answer_as_it_can(prompt: int, length: int, width: int) -> None:
    window = answer(prompt, length).window(width)
    assert len(window.ids) == min(width, prompt + length)
    assert not window.learned[0]
    assert sum(window.learned) == min(length, width - 1)
    first = window.ids[window.learned.index(1)]
    assert first == prompt


def test_little_text_makes_shorter_blocks() -> None:
    parts = split(texts(42), sequence=256, seed=0)
    assert parts.train.ids.shape == parts.held_out.ids.shape == (1, 21)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InvalidInput, match="too few"):
        split(texts(32), sequence=256, seed=0)


@given(st.integers(33, 400), st.integers(0, 5), st.floats(0.01, 0.99), st.integers(0, 12))
def test_the_split_is_disjoint_complete_and_the_seeds(count: int, seed: int, share: float, examples: int) -> None:
    """Also where examples are there twice."""
    both = texts(count)
    both.answers = [answer(2, 3, 1000 + 10 * (at // 2)) for at in range(examples)]
    parts = split(both, sequence=8, seed=seed, share=share)
    blocks = text_blocks(both.texts, 8)
    found = [tuple(row) for part in (parts.train, parts.held_out) for row in part.ids[:, :9].tolist()]
    assert sorted(row for row in found if row[0] < 1000) == sorted(map(tuple, blocks.ids.tolist()))
    sides = [{i for i in part.labels.unique().tolist() if i >= 1000} for part in (parts.train, parts.held_out)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {1000 + 10 * (at // 2) + 2 + k for at in range(examples) for k in range(3)}
    assert len(parts.train)
    assert len(parts.held_out)
    again = split(both, sequence=8, seed=seed, share=share)
    assert torch.equal(parts.train.ids, again.train.ids)
    assert torch.equal(parts.held_out.labels, again.held_out.labels)


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(InvalidInput, match="one example only"):
        split(Corpus(answers=[answer(2, 2)] * 3), sequence=8, seed=0)


def test_other_files_can_be_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n} ", "completion": f"a{n}"} for n in range(6)]
    train = load([lines(tmp_path / "a.jsonl", *rows)], TOKENIZER)
    other = load([lines(tmp_path / "b.jsonl", *rows[4:])], TOKENIZER)
    parts = split(train, sequence=64, seed=0, packing=False, validation=other)
    assert (len(parts.train), len(parts.held_out)) == (4, 2)
    with pytest.raises(InvalidInput, match=r"a\.jsonl is given to be trained on and to be held out"):
        split(train, sequence=64, seed=0, validation=train)
    every = load([lines(tmp_path / "c.jsonl", *rows, rows[0])], TOKENIZER)
    with pytest.raises(InvalidInput, match="No examples are left to train on"):
        split(train, sequence=64, seed=0, validation=every)


def test_blocks_of_different_widths_are_joined() -> None:
    joined = Blocks.join([Blocks.of_ids(torch.ones(1, 3, dtype=torch.int64)), Blocks.of_ids(torch.ones(2, 5).long())])
    assert joined.ids.shape == (3, 5)
    assert joined.labels[0].tolist() == [1, 1, IGNORED, IGNORED]
    assert joined.tokens == 2 + 2 * 4
