"""Keys, and what is read out of a server's words."""

from __future__ import annotations

from dataclasses import replace

from drama.augment.chat import MAX_DETAIL, Request, detail, estimate

REQUEST = Request(
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe? 大きさ 🐝"}),
    max_tokens=16,
    schema={"type": "object", "properties": {"query": {}, "language": {}}},
)


def test_a_key_stays_the_same_from_version_to_version() -> None:
    expected = "33468a151498751bb80d022df6e4ba21e5cb6b878b2949a1f75c5862e1abfbf7"
    assert REQUEST.key("tiny") == expected
    turned = tuple(dict(reversed(message.items())) for message in REQUEST.messages)
    assert replace(REQUEST, messages=turned, temperature=0).key("tiny") == expected


def test_all_that_the_answer_depends_on_is_in_the_key() -> None:
    properties = {"language": {}, "query": {}}  # models write in the order of the schema
    others = [
        replace(REQUEST, messages=REQUEST.messages[::-1]),
        replace(REQUEST, messages=REQUEST.messages[1:]),
        replace(REQUEST, max_tokens=17),
        replace(REQUEST, temperature=0.1),
        replace(REQUEST, top_p=0.9),
        replace(REQUEST, seed=0),
        replace(REQUEST, schema=None),
        replace(REQUEST, schema={"type": "object", "properties": properties}),
    ]
    keys = [request.key("tiny") for request in (REQUEST, *others)]
    keys += [REQUEST.key("other"), REQUEST.key("tiny", {"top_k": 1})]
    assert len(set(keys)) == len(keys)


def test_a_server_s_words_are_found() -> None:
    assert detail({"error": {"message": "too\nlong", "code": 400}}) == "too long"
    assert detail({"object": "error", "message": "too long"}) == "too long"
    assert detail({"detail": [{"msg": "bad"}]}) == '[{"msg": "bad"}]'
    assert detail({"error": "too long"}) == "too long"
    assert detail("<html>  502 </html>") == "<html> 502 </html>"
    assert detail(None) == ""
    assert len(detail("x" * 1000)) == MAX_DETAIL


def test_an_estimate_counts_bytes() -> None:
    assert [estimate(text) for text in ("", "a", "abcde", "大きさ大")] == [0, 1, 2, 3]
