"""Model cards: README.md with the YAML that model hubs read."""

import json
from collections.abc import Mapping, Sequence

HUB_LICENCES = {"GPL-3.0-only": "gpl-3.0", "GPL-3.0-or-later": "gpl-3.0", "LGPL-3.0-only": "lgpl-3.0"}


def card(
    title: str, *, base: str, licence: str, datasets: Sequence[str], library: str, facts: Mapping[str, str], usage: str
) -> bytes:
    """base: hub id or folder; licence: SPDX identifier or empty; datasets: names of files or of hub datasets; facts: by
    what they are, for people."""
    fields: dict[str, object] = {"library_name": library, "tags": ["p2pmodel"]}
    if base:
        fields["base_model"] = base
    if licence:
        fields["license"] = HUB_LICENCES.get(licence, licence.lower())
    if datasets:
        fields["datasets"] = sorted(set(datasets))
    head = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in fields.items())
    rows = "".join(f"- **{_line(name)}**: {_line(value)}\n" for name, value in facts.items())
    return f"---\n{head}---\n\n# {_line(title)}\n\n{rows}\n```python\n{usage}\n```\n".encode()


def _line(text: str) -> str:
    """Names of others' files stand in it."""
    return "".join(c if c.isprintable() and c not in "`<>" else "?" for c in text)
