import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.augment.answers import (
    MAX_QUERY_CHARS,
    Dropped,
    Query,
    Reason,
    Triplet,
    example_queries,
    parse_query,
    parse_tasks,
    parse_triplet,
)
from drama.augment.prompts import Prompt

DOCUMENT = (
    "Cast-iron stoves hold their heat for hours after the fire is out. A stove of ninety kilograms "
    "gives off warmth until the morning, but it needs an hour to become warm at all, so that many "
    "people who only heat in the evening are better served by one of sheet steel."
)
GERMAN = (
    "Gusseiserne Öfen halten die Wärme noch Stunden, nachdem das Feuer aus ist. Ein Ofen von "
    "neunzig Kilogramm wärmt bis zum Morgen, braucht aber eine Stunde, bis er warm wird."
)
CHINESE = (
    "铸铁炉在火熄灭后还能保温几个小时。九十公斤的炉子可以一直暖到早晨，但是需要一个小时才能热起来。"
)
QUERY = "how long does a cast iron stove stay warm"
TASK = "Given a question about heating, find a passage that answers it."


# -- queries --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        f"Task: {TASK}\nQuery: {QUERY}\nLanguage: English",
        f"task: {TASK}\nquery: {QUERY}\nlanguage: english",
        f"**Task:** {TASK}\n**Query:** {QUERY}\n**Language:** English",
        f"**Task**: {TASK}\n\n**Query**: *{QUERY}*\n\n**Language**: English",
        f'- Task: {TASK}\n- Query: "{QUERY}"\n- Language: English',
        f"1. Task: {TASK}\n2. Query: “{QUERY}”\n3. Language: English",
        f"### Task: {TASK}\n### Query: `{QUERY}`\n### Language: English",
        f"Sure! Here is a query for it:\n\nTask: {TASK}\nQuery: {QUERY}\nLanguage: English",
        f"```\nTask: {TASK}\nQuery: {QUERY}\nLanguage: English\n```",
        f"```json\n{json.dumps({'task': TASK, 'query': QUERY, 'language': 'English'})}\n```",
        f"{{'Task': '{TASK}', 'Search_Query': '{QUERY}', 'Language': 'en',}}",
        f'Here: {{"result": {{"task": "{TASK}", "query": "{QUERY}", "language": "English"',
        f"Task: {TASK} Query: {QUERY} Language: English",
        f"Task: {TASK}\nQuery:\n{QUERY}\nLanguage:\nEnglish",
        f"Task: {TASK}\nQuery: how long does a cast iron\nstove stay warm\nLanguage: English",
        f"Query: {QUERY}\nTask: {TASK}\nLanguage: English\n\nThis query asks about stoves.",
        f"<think>Which query? Query: no.</think>\nTask: {TASK}\nQuery: {QUERY}\nLanguage: English",
        f"Task: one sentence\nQuery: the query, in the language of the document\nLanguage: name\n\n"
        f"Task: {TASK}\nQuery: {QUERY}\nLanguage: English",
        f"| Task: {TASK} | Query: {QUERY} | Language: English",
        f"任务：{TASK}\n查询：{QUERY}\n语言：English",
    ],
)
def test_a_query_is_found_in_whatever_form(answer):
    found = parse_query(answer, DOCUMENT)
    assert isinstance(found, Query)
    assert found.text == QUERY
    if "one sentence" not in answer:
        assert found.task.rstrip(" |") == TASK
        assert found.language == "en"


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        (QUERY + "?", QUERY + "?"),
        (f"Here is the query:\n\n“{QUERY}”", QUERY),
        (f"Query: {QUERY}\nSuch a stove holds its heat.", QUERY),
        (f"Query: 1. {QUERY}\n2. another one", QUERY),
        ('Query: "to be or not" who wrote it', '"to be or not" who wrote it'),
        ('Query: pan 5 ft 10"', 'pan 5 ft 10"'),
        ("Query: -40 degrees", "-40 degrees"),
        ("Query: what does the Language: header do\nLanguage: English", "what does the Language: "
         "header do"),
        ("Query: I can't light my stove", "I can't light my stove"),
        *((f"Query: {query}", query) for query in (
            "how do I find work as an AI engineer without a degree",
            "as an AI engineer, where do I find work",
            "I'm sorry I missed the tide, when is the next one?",
            "sorry, but i am lost how do i get home",
            "I can't access my account, whom do I call",
        )),
        ("how do I find work as an AI engineer?", "how do I find work as an AI engineer?"),
        ('{"query": {"text": "when is high water"}}', "when is high water"),
        # SmolLM2-135M-Instruct
        (
            "Task: Given a question about the household, find instructions that answer it.\n\n"
            "Question: Does a stove keep warm at night?\n\nQuery: это, это потребудёт с возмож",
            "Does a stove keep warm at night?",
        ),
        (
            "Task: Given a question about the medical conditions, find the answer.\nQuery: what is "
            "the best treatment for someone with diabetes?\nLanguage: diabetes",
            "what is the best treatment for someone with diabetes?",
        ),
    ],
)  # fmt: skip
def test_a_query_keeps_what_is_its_own(answer, query):
    found = parse_query(answer, DOCUMENT)
    assert isinstance(found, Query)
    assert found.text == query


@pytest.mark.parametrize(
    ("answer", "document", "reason"),
    [
        ("", DOCUMENT, Reason.EMPTY),
        ("```\n```\n<think>hm", DOCUMENT, Reason.EMPTY),
        ("The document tells about stoves of iron.", DOCUMENT, Reason.NO_QUERY),
        ("Query:\nLanguage: English", DOCUMENT, Reason.NO_QUERY),
        ("Task: x\nQuery: <query>\nLanguage: y", DOCUMENT, Reason.NO_QUERY),
        ("Query: the query, in the language of the document", DOCUMENT, Reason.NO_QUERY),
        ('{"task": "x"}', DOCUMENT, Reason.NO_QUERY),
        # SmolLM2-135M-Instruct
        (
            "Task: Given a question about the weather, find a local weather report that confirms "
            "the weather forecast for 12 June 2022.\nLanguage: English",
            DOCUMENT,
            Reason.NO_QUERY,
        ),
        (
            "Task: Given the title of a document, find a passage that supports or refutes it.\n"
            "Query: На всех месяцах можно убиться с пассивами, которые находятся в каждой жизике",
            DOCUMENT,
            Reason.WRONG_LANGUAGE,
        ),
        (
            'Query: "Dokumente japaner wieflegen, aber die Religion der Islame in Japan ist, 100% '
            'der Europäe, erstellen mit Deutschland und USA,"\nLanguage: German',
            DOCUMENT,
            Reason.WRONG_LANGUAGE,
        ),
        ("I'm sorry, but I can't see the document.", DOCUMENT, Reason.REFUSAL),
        ("Query: As an AI language model, I have no stove", DOCUMENT, Reason.REFUSAL),
        ("I cannot assist with that.", DOCUMENT, Reason.REFUSAL),
        ("I'm sorry, but could you send me the document?", DOCUMENT, Reason.REFUSAL),
        *(
            (f"Query: {refusal}", DOCUMENT, Reason.REFUSAL)
            for refusal in (
                "I'm sorry, but I can't help with that",
                "I’m sorry, but I cannot generate a query",
                "I am unable to provide a query",
                "I'm unable to access the document",
                "Unfortunately, I cannot answer",
                "As an AI, I have no stove",
                "I apologize, but I can't write one",
                "Sorry, but as an AI assistant, I cannot say",
            )
        ),
        ('{"query": {"words": "is it warm?"}}', DOCUMENT, Reason.NO_QUERY),
        ("Query: 抱歉，我无法回答", CHINESE, Reason.REFUSAL),
        ("Query: ?!", DOCUMENT, Reason.NO_QUERY),
        ("Query: a b", DOCUMENT, Reason.TOO_SHORT),
        ("Query: 炉", CHINESE, Reason.TOO_SHORT),
        ("Query: " + "stove and " * 100, DOCUMENT, Reason.TOO_LONG),
        ("Query: " + DOCUMENT[:100], DOCUMENT, Reason.DOCUMENT_ECHO),
        ("Query: Why? " + DOCUMENT[70:190].upper(), DOCUMENT, Reason.DOCUMENT_ECHO),
        ("Query: " + CHINESE[:40], CHINESE, Reason.DOCUMENT_ECHO),
        ("Query: How long does a stove stay warm?", GERMAN, Reason.WRONG_LANGUAGE),
        ("Query: How long does a stove stay warm?", CHINESE, Reason.WRONG_LANGUAGE),
        ("Query: 炉子能保温多久", DOCUMENT, Reason.WRONG_LANGUAGE),
    ],
)
def test_an_answer_of_no_use_is_dropped_with_its_reason(answer, document, reason):
    assert parse_query(answer, document) == Dropped(reason)


@pytest.mark.parametrize(
    ("query", "document"),
    [
        ("Cast-iron stoves hold their heat for hours", DOCUMENT),  # a title may be the document's
        ("铸铁炉在火熄灭后还能保温", CHINESE),
        ("炉子", CHINESE),
        # a quotation of fifteen words in a longer request
        ("My neighbour says that " + DOCUMENT[:75] + ", is that so, and would it do for us "
         "who come home late?", DOCUMENT),
        ("Wie lange hält ein gusseiserner Ofen die Wärme?", GERMAN),
        ("Many people who heat in the evening want warmth until the morning, which stove is it?",
         DOCUMENT),
    ],
)  # fmt: skip
def test_likeness_to_the_document_is_no_echo(query, document):
    assert parse_query(f"Query: {query}", document) == Query(query)


def test_an_example_of_the_prompt_is_no_query():
    examples = example_queries(Prompt.load("queries").answers)
    answer = f"Query: **{examples[-1].upper()}!**\nLanguage: English"
    assert parse_query(answer, DOCUMENT, examples) == Dropped(Reason.EXAMPLE_ECHO)
    assert isinstance(parse_query(answer, DOCUMENT), Query)


# letters and inner punctuation; labels are another test's
SENTENCE = st.lists(
    st.sampled_from(
        ["stove", "iron", "naïve", "炉子", "C++", "x_1", "don't", "3.5", "50%", "(old)"]
    ),
    min_size=2,
    max_size=8,
).map(lambda parts: "q" + " ".join(parts))
NOISE = st.sampled_from(["", "Sure, here it is:\n\n", "```\n", "<think>Query: no</think>", "\n \n"])
AFTER = st.sampled_from(
    ["", "\n```", "\n\nI hope this helps!", "\nLanguage: English", "\n\n- Query: b"]
)


@settings(max_examples=150, deadline=None)
@given(
    NOISE, SENTENCE, AFTER, st.sampled_from(["Query: {}", '**query:** "{}"', '{{"query": "{}"}}'])
)
def test_noise_around_an_answer_changes_nothing(before, query, after, form):
    assert parse_query(before + form.format(query) + after, "") == Query(
        query, language="en" if "Language" in after and "{{" not in form else ""
    )


MARKS = "Query: Task: Language: ``` ~~~ ` ** * \" ' { } [ ] : , <think> </think> > \\ \\u00 [3]"
WORDS = ["query", "positive", "negative", "yes", "no", "I cannot answer", "stove", "炉", "9" * 9]
TOKENS = st.lists(
    st.sampled_from([*MARKS.split(" "), *WORDS, "\n", " ", "- ", "1. ", "\ud800", "\x00"])
    | st.text(max_size=5),
    max_size=30,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(TOKENS)
def test_no_answer_raises_and_a_query_is_one_clean_line(answer):
    found = parse_query(answer, DOCUMENT)
    if isinstance(found, Query):
        assert found.text == found.text.strip()
        assert found.text
        assert len(found.text) <= MAX_QUERY_CHARS
        assert not any(mark in found.text for mark in ("\n", "\r", "```", "~~~", "**", "\x00"))
        found.text.encode()
    triplet = parse_triplet(answer, "en")
    assert isinstance(triplet, Triplet | Dropped)
    tasks = parse_tasks(answer)
    assert isinstance(tasks, Dropped) or (tasks and not any("\n" in task for task in tasks))


# -- triplets -------------------------------------------------------------------------------------

POSITIVE = "A stove of cast iron stays warm for about eight hours, since its mass stores the heat."
NEGATIVE = 'Cast iron "seasoning" is a layer of oil that keeps a pan from rusting in the kitchen.'
TRIPLET = Triplet(QUERY, POSITIVE, NEGATIVE)
AS_JSON = json.dumps({"query": QUERY, "positive": POSITIVE, "negative": NEGATIVE})


@pytest.mark.parametrize(
    "answer",
    [
        AS_JSON,
        f"Here is your example:\n```json\n{AS_JSON}\n```\nLet me know!",
        f"<think>{{}}</think>{AS_JSON}",
        AS_JSON.replace("}", ",}"),
        AS_JSON.replace('\\"', '"'),  # quotes that are not escaped
        AS_JSON.removesuffix("}"),
        AS_JSON.removesuffix('"}'),
        AS_JSON.replace('"positive"', '"positive_document"').replace(
            '"negative"', '"Hard Negative"'
        ),
        AS_JSON.replace('", "', '"\n"'),
        f"{{'query': '{QUERY}', 'positive': '{POSITIVE}', 'negative': '{NEGATIVE}'}}",
        f'{{"example": {AS_JSON}}}',
        f"[{AS_JSON}]",
        json.dumps({name: {"text": text} for name, text in json.loads(AS_JSON).items()}),
        f"Query: {QUERY}\nPositive document: {POSITIVE}\nHard negative: {NEGATIVE}",
    ],
)
def test_a_triplet_is_mended(answer):
    assert parse_triplet(answer, "en") == TRIPLET


def test_lines_of_a_document_stay():
    answer = f'{{"query": "{QUERY}", "positive": "{POSITIVE}\n\nA  list:\n- one", "negative": "' + (
        "Something else that is long enough" + '"}'
    )
    found = parse_triplet(answer)
    assert isinstance(found, Triplet)
    assert found.positive == f"{POSITIVE}\nA list:\n- one"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"negative": ""}, Reason.MISSING_FIELD),
        ({"positive": None}, Reason.MISSING_FIELD),
        ({"query": "string"}, Reason.MISSING_FIELD),
        ({"negative": POSITIVE.upper()}, Reason.SAME_TEXTS),
        ({"query": POSITIVE}, Reason.SAME_TEXTS),
        ({"positive": "Eight hours."}, Reason.DOCUMENT_LENGTH),
        ({"negative": "stove " * 3000}, Reason.DOCUMENT_LENGTH),
        ({"query": "?a"}, Reason.TOO_SHORT),
        ({"query": "why " * 300}, Reason.TOO_LONG),
        ({"query": "stays warm for about eight hours, since its mass stores the heat. a stove of "
          "cast iron", "positive": "stays warm for about eight hours, since its mass stores the "
          "heat. a stove of cast iron. Yes."}, Reason.DOCUMENT_ECHO),
        ({"positive": GERMAN}, Reason.WRONG_LANGUAGE),
        ({"query": "Wie lange hält ein Ofen die Wärme, wenn das Feuer aus ist?"},
         Reason.WRONG_LANGUAGE),
    ],
)  # fmt: skip
def test_a_triplet_of_no_use_is_dropped_with_its_reason(change, reason):
    value = {"query": QUERY, "positive": POSITIVE, "negative": NEGATIVE} | change
    assert parse_triplet(json.dumps(value), "en") == Dropped(reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("  ", Reason.EMPTY),
        ("The farmer asks about frost.", Reason.NO_JSON),
        (AS_JSON.replace(': "', ': {"words": "').replace('", ', '"}, ') + "}", Reason.NO_JSON),
        ("I'm sorry, I can't create such examples.", Reason.REFUSAL),
        # SmolLM2-135M-Instruct
        (
            '```\n{\n  "query": {\n    "positive": "Cerebro-Aurora 2022",\n    "negative": '
            '"Cerebro-Aurora 2022",\n    "all": {\n      "task": "Cerebro-Aurora 2022"\n    }\n  }',
            Reason.MISSING_FIELD,
        ),
        (
            '"dearfarmercampaigns:155560, 0, "dearfarmercampaigns:273519, 1, "dearfarmer',
            Reason.NO_JSON,
        ),
    ],
)
def test_what_is_no_triplet_says_why(answer, reason):
    assert parse_triplet(answer, "en") == Dropped(reason)


def test_an_example_of_the_prompt_is_no_triplet():
    assert parse_triplet(AS_JSON, "en", [QUERY.upper()]) == Dropped(Reason.EXAMPLE_ECHO)


# -- tasks ----------------------------------------------------------------------------------------

TASKS = (
    "Given a question about stoves, find an answer.",
    "Given a symptom, find the repair that mends it.",
)


@pytest.mark.parametrize(
    "answer",
    [
        f"- {TASKS[0]}\n- {TASKS[1]}",
        f"1. {TASKS[0]}\n2. {TASKS[1]}\n3. {TASKS[0].upper()}",
        f"Here are two tasks:\n\n1) **{TASKS[0]}**\n\n2) “{TASKS[1]}”\n\nShall I go on?",
        f"{TASKS[0]}\n{TASKS[1]}",
        f"Task 1: {TASKS[0]}\nTask 2: {TASKS[1]}",
        json.dumps(TASKS),
        json.dumps([{"task": TASKS[0]}, {"task": TASKS[1]}]),
        json.dumps({"1": TASKS[0], "2": TASKS[1]}),
        json.dumps({"title": "The tasks of this list", "tasks": TASKS}),
        f"```json\n{json.dumps(TASKS)[:-2]}\n```",
        f"* {TASKS[0]}\n* {TASKS[1]}\n* too short",
    ],
)
def test_tasks_are_listed_once_each(answer):
    assert parse_tasks(answer) == TASKS


def test_tasks_of_a_small_model():
    answer = (  # SmolLM2-135M-Instruct
        "- A human in the hospital wants to know what is in the refrigerator.\n"
        "- A child in a room wants to know what is in the fridge.\n"
        "- A human in the hospital wants to know what is in the refrigerator."
    )
    assert parse_tasks(answer) == (
        "A human in the hospital wants to know what is in the refrigerator.",
        "A child in a room wants to know what is in the fridge.",
    )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", Reason.EMPTY),
        ("Sure! Here is the list of tasks:", Reason.NO_TASKS),
        ("- one\n- two", Reason.NO_TASKS),
        ("I cannot provide such a list.", Reason.REFUSAL),
        ("- " + "very " * 200 + "long", Reason.NO_TASKS),
    ],
)
def test_a_list_of_no_use_says_why(answer, reason):
    assert parse_tasks(answer) == Dropped(reason)
