"""Prefix, EOS and limit, for tokenizers that start with BOS, end in EOS already, or pad."""

import pytest
from tokenizers.processors import TemplateProcessing

from drama.errors import UserError
from drama.testing import byte_tokenizer
from drama.tokenizer import TextEncoder, load_tokenizer


def saved(tmp_path, template: str | None = None, *, padded: bool = False):
    """A byte tokenizer with a post-processor such as Llama 3's, written to a folder."""
    tokenizer = byte_tokenizer()
    if template:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if padded:
        tokenizer.backend_tokenizer.enable_padding(length=64)
        tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.save_pretrained(tmp_path)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "ab</s>"),
        ("<s> $A", "<s>ab</s>"),
        ("$A </s>", "ab</s>"),
        ("<s> $A </s>", "<s>ab</s>"),
    ],
)
def test_eos_is_appended_once_and_bos_stays(tmp_path, template, expected):
    tokenizer = saved(tmp_path, template)
    rows, num_cut = TextEncoder(tokenizer)(["ab"], "document", 10)
    assert tokenizer.decode(rows[0]) == expected
    assert num_cut == 0
    tokenizer.save_pretrained(tmp_path / "again")  # what other libraries will load
    again = load_tokenizer(tmp_path / "again")
    assert again("ab")["input_ids"] == rows[0]


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path):
    rows, _ = TextEncoder(saved(tmp_path, padded=True))(["ab", "c" * 30], "document", 40)
    assert [len(row) for row in rows] == [3, 31]


def test_prefixes_and_cut_texts(tmp_path):
    encode = TextEncoder(saved(tmp_path, "<s> $A"), "q: ", "d: ")
    (query, cut), num_cut = encode(["ab", "x" * 50], "query", 9)
    assert encode.tokenizer.decode(query) == "<s>q: ab</s>"
    assert encode.tokenizer.decode(cut) == "<s>q: xxxx</s>"
    assert num_cut == 1
    assert encode.tokenizer.decode(encode(["ab"], "document", 9)[0][0]) == "<s>d: ab</s>"


def test_a_lost_prefix_or_a_text_taken_apart_is_refused(tmp_path):
    encode = TextEncoder(saved(tmp_path))
    with pytest.raises(UserError, match="'queries' must be query or document"):
        encode(["ab"], "queries", 9)
    with pytest.raises(UserError, match="give a list of texts"):
        encode("ab", "query", 9)


def test_an_empty_text_is_eos_alone(tmp_path):
    rows, _ = TextEncoder(saved(tmp_path))([""], "document", 9)
    assert rows == [[2]]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="EOS"):
        load_tokenizer(tmp_path)
