"""Every command that a document tells people to type exists, with the options that it is given."""

import pytest

from scripts.generate.commands import command_tree
from tests.support.documents import ROOT, blocks, calls, complaint, pages, typed

TREE = command_tree()


@pytest.mark.parametrize("page", pages())
def test_what_a_page_says_to_type_can_be_typed(page: str) -> None:
    wrong = [
        f"{page}:{line.number}: {why}: {line.text}"
        for line in typed((ROOT / page).read_text(encoding="utf-8"))
        for arguments in calls(line.text)
        if (why := complaint(TREE, arguments, line.whole))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_pages_have_something_to_type() -> None:
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in pages()]
    assert sum(1 for text in texts for line in typed(text) for _ in calls(line.text)) > 150


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("p2pmodel join --layers 0:3 --cpu", ""),
        ("sudo -u p2pmodel /opt/bin/p2pmodel status --home DIR && p2pmodel fsck", ""),
        ("P2PMODEL_HOME=x p2pmodel infer --max-new-tokens=9 'import ' | tail > out.txt", ""),
        ("p2pmodel --log-level INFO join", ""),
        ("systemctl status p2pmodel --no-such-option", ""),
        ("p2pmodel join --lairs 0:3", "p2pmodel join has no option --lairs"),
        ("p2pmodel joyn", "p2pmodel has no command joyn"),
        ("p2pmodel patch shew PATCH", "p2pmodel patch has no command shew"),
        ("p2pmodel infer --max-new-tokens many 'import '", "--max-new-tokens of p2pmodel infer: "),
        ("p2pmodel infer a b", "p2pmodel infer takes 1 arguments, not 2"),
        ("p2pmodel infer", "p2pmodel infer also needs prompt"),
        ("p2pmodel round reject CANDIDATE", "p2pmodel round reject also needs --reason"),
        ("p2pmodel status --home", "--home of p2pmodel status needs a value"),
        ("p2pmodel train --schedule sometimes --data x", "--schedule of p2pmodel train: "),
        ("true; p2pmodel doctor --fix", "p2pmodel doctor has no option --fix"),
    ],
    ids=lambda text: text.replace(" ", "_")[:40],
)
def test_what_is_wrong_with_a_call_is_found(line: str, why: str) -> None:
    found = [complaint(TREE, arguments) for arguments in calls(line)]
    assert any(each.startswith(why) for each in found) if why else not any(found), found


def test_lines_are_found_where_people_would_copy_them_from() -> None:
    page = """\
Say `p2pmodel doctor`, then

```console title="One"
$ p2pmodel join \\
>     --layers 0:3
serving layers 0:3
$ ls
```

```
p2pmodel log
not a command
```

```python
p2pmodel.anything()
```
"""
    lines = [(line.number, line.text.split(), line.whole) for line in typed(page)]
    assert lines == [
        (4, ["p2pmodel", "join", "--layers", "0:3"], True),
        (7, ["ls"], True),
        (11, ["p2pmodel", "log"], True),
        (1, ["p2pmodel", "doctor"], False),
    ]
    assert [(block.language, block.title) for block in blocks(page)] == [("console", "One"), ("", ""), ("python", "")]
