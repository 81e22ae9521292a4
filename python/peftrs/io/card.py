"""The model card beside an adapter: a README whose header hubs and trainers read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from peftrs import _native

CARD_NAME = "README.md"
PLAIN = re.compile(r"[A-Za-z0-9][\w./-]*")
VERSION = "### Framework versions"

TEXT = """
# Adapter

An adapter ({methods}) for {base}, made with [PEFT](https://github.com/huggingface/peft)'s file format.

```python
from peftrs import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```
"""


def card(
    existing: str | None, *, base: str, methods: Sequence[str], tags: Iterable[str], pipeline: str | None
) -> str:
    """The text of a card: an existing one with its header brought up to date, or a new one.

    The header gets `library_name`, `tags` and, if the base has a name, `base_model` as given; `pipeline_tag`
    where none is yet.
    """
    header, body = _split(existing or "")
    fields = {"base_model": _scalar(base)} if base else {}
    fields |= {
        "library_name": "peft",
        "tags": "".join(f"\n- {_scalar(tag)}" for tag in sorted(set(tags))),
    }
    if pipeline and not re.search(r"^pipeline_tag:", header, re.MULTILINE):
        fields["pipeline_tag"] = pipeline
    for name, value in fields.items():
        header = _replaced(header, name, value)
    if not existing:
        body = TEXT.format(
            methods=", ".join(sorted(set(methods))), base=f"`{_line(base)}`" if base else "a base model"
        )
    if VERSION not in body:
        body = f"{body.rstrip()}\n\n{VERSION}\n\n- peftrs {_native.__version__}\n"
    return f"---\n{header.strip()}\n---\n{body}"


def _split(text: str) -> tuple[str, str]:
    """The YAML header of a card, and what follows it."""
    match = re.match(r"\A---\r?\n(.*?)^---[ \t]*\r?\n?", text, re.DOTALL | re.MULTILINE)
    return (match[1], text[match.end() :]) if match else ("", text)


def _replaced(header: str, name: str, value: str) -> str:
    """The header with one field set, wherever and however long it stood."""
    line = f"{name}:{value if value.startswith(chr(10)) else f' {value}'}\n"
    pattern = rf"^{name}:.*\n(?:[ \t-].*\n)*"
    header = header if not header or header.endswith("\n") else f"{header}\n"
    if re.search(pattern, header, re.MULTILINE):
        return re.sub(pattern, lambda _: line, header, count=1, flags=re.MULTILINE)
    return header + line


def _scalar(value: str) -> str:
    """A YAML scalar on one line; JSON strings are YAML's."""
    return value if PLAIN.fullmatch(value) else json.dumps(value)


def _line(value: str) -> str:
    return re.sub(r"[\x00-\x1f`\x7f]", " ", value)[:200]
