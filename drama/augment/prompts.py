"""Prompts as files: a system text, few-shot turns and a template, with a version.

    version: 1                # raise it when the wording changes
    system: |                 # optional
      You write search queries.
    turns:                    # optional few-shot turns: the template's values, and the answer
      - document: The tide follows the moon.
        answer: "Query: why are there tides"
    user: |
      <document>{{document}}</document>

A list in a turn becomes numbered passages, as the builders in `messages` number them. YAML comments
are no part of the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from drama.augment.quoting import numbered
from drama.errors import UserError, nearest

Message = dict[str, str]  # {"role": ..., "content": ...}, as chat endpoints take it

SHIPPED = Path(__file__).parent / "prompts"
# the placeholders that a template must have, and those that it may have
PLACEHOLDERS: dict[str, tuple[set[str], set[str]]] = {
    "queries": ({"document"}, set()),
    "rerank": ({"query", "passages"}, {"number"}),
    "tasks": ({"topic", "search"}, {"number"}),
    "triplets": (
        {"task", "language"},
        {"query_length", "document_length", "difficulty", "clarity"},
    ),
    "relabel": ({"query", "passages"}, {"positive", "number"}),
}
_KEYS = ("version", "system", "turns", "user")
_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that was read and checked. `turns` are rendered; `system` and `user` are templates.

    kind: a key of `PLACEHOLDERS`. key: kind, version and a hash of the text ("queries-1-0f3a..."),
    which changes whenever the messages would.
    """

    kind: str
    version: int
    system: str
    turns: tuple[tuple[str, str], ...]  # (user, assistant)
    user: str
    key: str

    @classmethod
    def load(cls, kind: str, path: str | Path | None = None) -> Prompt:
        """Read the shipped prompt of a kind, or a user's own from `path`.

        Raises:
            UserError: unreadable, not the form above, or a placeholder that is unknown or missing;
                the message names the file and the placeholder.
        """
        path = Path(path) if path is not None else SHIPPED / f"{kind}.yaml"
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"prompt {path} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt {path} cannot be read: {error}") from error
        except (yaml.YAMLError, RecursionError) as error:
            fault = " ".join(str(error).split())
            raise UserError(f"prompt {path} is not valid YAML: {fault}") from error
        try:
            return cls._from_tree(kind, tree)
        except UserError as error:
            raise UserError(f"prompt {path}: {error}") from None

    @classmethod
    def _from_tree(cls, kind: str, tree: Any) -> Prompt:
        if not isinstance(tree, dict):
            raise UserError(f"expected a mapping with {', '.join(_KEYS)}")
        for key in tree:
            if key not in _KEYS:
                raise UserError(f"unknown key {key}{nearest(str(key), _KEYS)}")
        version = tree.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise UserError(f"version must be a whole number from 1 on (got {version!r})")
        system, user = (_string(tree.get(key, ""), key) for key in ("system", "user"))
        if not user:
            raise UserError("user is missing: the template of the question")
        names = _check_placeholders(kind, {"system": system, "user": user})
        turns = tree.get("turns", [])
        if not isinstance(turns, list):
            raise UserError("turns must be a list of mappings with the values and the answer")
        in_user = names & set(_PLACEHOLDER.findall(user))
        rendered = tuple(
            _turn(user, in_user, turn, f"turns[{number}]") for number, turn in enumerate(turns)
        )
        text = json.dumps([system, rendered, user], ensure_ascii=False)
        digest = blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return cls(kind, version, system, rendered, user, f"{kind}-{version}-{digest}")

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers of the few-shot turns, which a small model likes to give again."""
        return tuple(answer for _, answer in self.turns)

    def messages(self, values: Mapping[str, str]) -> list[Message]:
        """The chat with every placeholder filled in; `values` must have all of the kind's."""
        chat = [("system", _render(self.system, values))] if self.system else []
        for question, answer in self.turns:
            chat += [("user", question), ("assistant", answer)]
        chat.append(("user", _render(self.user, values)))
        return [{"role": role, "content": content} for role, content in chat]


def _render(template: str, values: Mapping[str, str]) -> str:
    # one pass: what a document holds is never taken for a placeholder
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be a text (got {value!r})")
    return value.strip()


def _check_placeholders(kind: str, templates: Mapping[str, str]) -> set[str]:
    """The placeholders in the templates."""
    required, optional = PLACEHOLDERS[kind]
    known = sorted(required | optional)
    names: set[str] = set()
    for where, template in templates.items():
        for name in _PLACEHOLDER.findall(template):
            if name not in known:
                raise UserError(
                    f"unknown placeholder {{{{{name}}}}} in {where}{nearest(name, known)}; "
                    f"{kind} has {', '.join(known)}"
                )
            names.add(name)
        rest = _PLACEHOLDER.sub("", template)
        if "{{" in rest:
            start = rest.index("{{")
            raise UserError(f"{where} has '{rest[start : start + 20]}', which is no {{{{name}}}}")
    for name in sorted(required - names):
        raise UserError(f"the placeholder {{{{{name}}}}} is missing")
    return names


def _turn(user: str, names: set[str], turn: Any, where: str) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise UserError(f"{where} must be a mapping of the template's values and answer")
    for key in turn:
        if key not in names | {"answer"}:
            raise UserError(f"unknown key {key} in {where}{nearest(str(key), names)}")
    values: dict[str, str] = {}
    for name in sorted(names):
        if name not in turn:
            raise UserError(f"{where} has no value for {{{{{name}}}}}")
        values[name] = _value(turn[name], f"{where}.{name}")
    answer = _string(turn.get("answer", ""), f"{where}.answer")
    if not answer:
        raise UserError(f"{where} has no answer")
    return _render(user, values), answer


def _value(value: Any, where: str) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return numbered([_string(item, where) for item in value])
    return _string(str(value) if type(value) is int else value, where)
