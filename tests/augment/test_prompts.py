import pytest

from drama.augment.answers import example_queries, parse_tasks
from drama.augment.languages import differs
from drama.augment.prompts import PLACEHOLDERS, Prompt
from drama.augment.rankings import parse_labels, parse_ranking
from drama.errors import UserError

OWN = """
version: 3  # a comment
system: You write queries.
turns:
  - document: The tide follows the moon.
    answer: "Query: why are there tides"
user: "Document: {{ document }}"
"""


@pytest.fixture
def own(tmp_path):
    """Write a prompt and load it."""

    def load(text, kind="queries"):
        path = tmp_path / "own.yaml"
        path.write_text(text, encoding="utf-8")
        return Prompt.load(kind, path)

    return load


@pytest.mark.parametrize("kind", PLACEHOLDERS)
def test_a_shipped_prompt_is_a_chat_that_ends_with_the_question(kind):
    prompt = Prompt.load(kind)
    required, optional = PLACEHOLDERS[kind]
    chat = prompt.messages({name: f"<{name}>" for name in required | optional})
    roles = [message["role"] for message in chat]
    assert roles == ["system", *["user", "assistant"] * len(prompt.turns), "user"]
    assert not any("{{" in message["content"] for message in chat)
    for name in required | optional:
        assert f"<{name}>" in chat[-1]["content"]
    assert prompt.key.startswith(f"{kind}-{prompt.version}-")


def test_the_shipped_examples_are_answers_that_we_can_read():
    queries = Prompt.load("queries")
    examples = example_queries(queries.answers)
    assert len(examples) == len(queries.turns) == 5
    for (question, _), query in zip(queries.turns, examples, strict=True):
        assert not differs(query, question.partition("</document>")[0].partition(">")[2])
    (order,) = Prompt.load("rerank").answers
    assert parse_ranking(order, 4).order == (2, 3, 0, 1)
    (labels,) = Prompt.load("relabel").answers
    assert parse_labels(labels, 3) == (False, True, False)
    (tasks,) = Prompt.load("tasks").answers
    assert len(parse_tasks(tasks)) == 3


def test_a_user_s_prompt_takes_the_place_of_ours(own):
    prompt = own(OWN)
    assert prompt.messages({"document": "Ice floats."}) == [
        {"role": "system", "content": "You write queries."},
        {"role": "user", "content": "Document: The tide follows the moon."},
        {"role": "assistant", "content": "Query: why are there tides"},
        {"role": "user", "content": "Document: Ice floats."},
    ]


def test_what_stands_in_a_document_is_no_placeholder(own):
    chat = own(OWN).messages({"document": "{{document}} {{query}} \\1"})
    assert chat[-1]["content"] == "Document: {{document}} {{query}} \\1"


def test_the_key_follows_the_messages(own):
    key = own(OWN).key
    assert own(OWN.replace("a comment", "another")).key == key
    assert own(OWN.replace("version: 3", "version: 4")).key != key
    for word in ("You write", "moon", "why are", "Document:"):
        assert own(OWN.replace(word, "Other")).key != key


def test_passages_of_a_turn_are_numbered(own):
    prompt = own(
        "{version: 1, user: '{{query}} {{passages}}',"
        " turns: [{query: q, passages: [a, b], answer: '[2] > [1]'}]}",
        "rerank",
    )
    assert prompt.turns == (("q [1] a\n[2] b", "[2] > [1]"),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{{ document }}",
            "{{documnet}}",
            r"unknown placeholder \{\{documnet\}\} in user .did you",
        ),
        ("{{ document }}", "it", r"the placeholder \{\{document\}\} is missing"),
        ("{{ document }}", "{{document}} {{doc}", r"user has '\{\{doc\}', which is no"),
        ("You write", "You {{task}}", r"unknown placeholder \{\{task\}\} in system"),
        ("  - document:", "  - documents:", r"unknown key documents in turns\[0\] .did you"),
        ("  - document: The tide follows the moon.", "  - {}", "not valid YAML"),
        ("The tide follows the moon.", "[1, 2]", r"turns\[0\].document must be a text"),
        ("Query: why are there tides", "", r"turns\[0\] has no answer"),
        ("turns:\n", "turns: 3\nturn:\n", r"unknown key turn .did you mean 'turns'"),
        ("version: 3", "version: true", r"version must be a whole number .* .got True"),
        ("version: 3", "version: 0", r"version must be a whole number"),
        ("version: 3", "", r"version must be a whole number .* .got None"),
        ("user:", "system:", "user is missing"),
        ("You write queries.", "3", r"system must be a text .got 3"),
        (OWN, "[]", "expected a mapping with version"),
        (OWN, "{", "not valid YAML"),
        (OWN, "{version: 1, user: '{{document}}', turns: 3}", "turns must be a list"),
        (OWN, "{version: 1, user: '{{document}}', turns: [3]}", r"turns\[0\] must be a mapping"),
        (
            OWN,
            "{version: 1, user: '{{document}}', turns: [{answer: a}]}",
            r"turns\[0\] has no value for \{\{document\}\}",
        ),
    ],
)
def test_a_fault_names_file_and_place(own, old, new, message):
    assert old in OWN
    with pytest.raises(UserError, match=rf"prompt .*own\.yaml:? .*{message}"):
        own(OWN.replace(old, new, 1) if old != OWN else new)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"prompt .*gone\.yaml does not exist"):
        Prompt.load("queries", tmp_path / "gone.yaml")
    (tmp_path / "latin.yaml").write_bytes("user: é".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompt .*latin\.yaml cannot be read"):
        Prompt.load("queries", tmp_path / "latin.yaml")
