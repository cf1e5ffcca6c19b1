"""What clients ask for, read without trust: OpenAI's form of an embedding request, and searches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from drama.errors import nearest
from drama.serve.limits import Limits
from drama.tokenizer import Kind

EMBED_KEYS = ("input", "model", "dimensions", "encoding_format", "user", "input_type")
SEARCH_KEYS = ("q", "k", "dim")
KINDS: tuple[Kind, ...] = ("query", "document")
FORMATS = ("float", "base64")


class RequestError(Exception):
    """A request that is not answered: HTTP status, one line, and the field at fault."""

    def __init__(self, status: int, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field = status, field

    def to_json(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.field, "code": self.status}
        return {"error": error}


@dataclass(frozen=True)
class EmbedRequest:
    """Texts to embed. dim: width of the vectors, None for the server's."""

    texts: list[str]
    kind: Kind
    dim: int | None
    format: Literal["float", "base64"]


@dataclass(frozen=True)
class SearchRequest:
    """A search. dim: width at which vectors are compared, None for the server's."""

    text: str
    k: int
    dim: int | None


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        RequestError: 400, no JSON or no object.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(400, f"the body is no JSON: {reason}") from None
    if not isinstance(value, dict):
        raise RequestError(400, "the body must be a JSON object")
    return value


def embed_request(value: dict[str, Any], model: str, limits: Limits) -> EmbedRequest:
    """Check an embedding request.

    Args:
        model: the name under which the model is served.

    Raises:
        RequestError: 404 for another model, 413 for more than the limits allow, else 422.
    """
    _check_keys(value, EMBED_KEYS)
    if "input" not in value:
        raise RequestError(422, "'input' is missing: a text or a list of texts", "input")
    asked = value.get("model", model)
    if asked != model:
        raise RequestError(
            404, f"the model {_short(asked)} is not served here; '{model}' is", "model"
        )
    kind = _choice(value, "input_type", KINDS, "document")
    format_ = _choice(value, "encoding_format", FORMATS, "float")
    texts = _texts(value["input"], limits)
    return EmbedRequest(texts, kind, _whole(value, "dimensions"), format_)


def search_request(value: Mapping[str, Any], limits: Limits) -> SearchRequest:
    """Check a search; from an address numbers come as text.

    Raises:
        RequestError: 413 for a text that is too long, else 422.
    """
    _check_keys(value, SEARCH_KEYS)
    if "q" not in value:
        raise RequestError(422, "'q' is missing: the question", "q")
    numbers = {name: _number(value[name]) for name in ("k", "dim") if name in value}
    k = _whole(numbers, "k") or 10
    if k > limits.max_k:
        raise RequestError(422, f"k {k} is too much; {limits.max_k} is the most", "k")
    return SearchRequest(_text(value["q"], "q", limits), k, _whole(numbers, "dim"))


def _texts(value: Any, limits: Limits) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        raise RequestError(422, "'input' must be a text or a list of texts", "input")
    if not values:
        raise RequestError(422, "'input' is an empty list", "input")
    if any(isinstance(item, int | list) for item in values):
        raise RequestError(
            422,
            "'input' holds token ids; send texts (in LangChain: check_embedding_ctx_length=False)",
            "input",
        )
    if len(values) > limits.max_texts:
        most = f"{limits.max_texts:,} are the most (--max-texts)"
        raise RequestError(413, f"'input' holds {len(values):,} texts; {most}", "input")
    return [_text(item, f"input[{i}]", limits) for i, item in enumerate(values)]


def _text(value: Any, where: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise RequestError(422, f"'{where}' must be a text", where)
    if not value.strip():
        raise RequestError(422, f"'{where}' is empty", where)
    if len(value) > limits.max_chars:
        raise RequestError(
            413,
            f"'{where}' has {len(value):,} characters; {limits.max_chars:,} are the most",
            where,
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise RequestError(422, f"'{where}' is not valid UTF-8", where) from None
    return value


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            raise RequestError(422, f"unknown field {_short(key)}{nearest(key, known)}", key[:80])


def _choice(value: dict[str, Any], key: str, choices: tuple[str, ...], default: str) -> Any:
    found = value.get(key)
    if found is None:
        return default
    if found not in choices:
        raise RequestError(422, f"'{key}' is {_short(found)}; there are {', '.join(choices)}", key)
    return found


def _whole(value: Mapping[str, Any], key: str) -> int | None:
    found = value.get(key)
    if found is None:
        return None
    if type(found) is not int or found < 1:
        raise RequestError(422, f"'{key}' must be a whole number above 0, not {_short(found)}", key)
    return found


def _number(value: Any) -> Any:
    """An address's "10" as 10; what is no number stays."""
    digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10
    return int(value) if digits else value


def _short(value: Any) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else f"{shown[:76]} ..."


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
