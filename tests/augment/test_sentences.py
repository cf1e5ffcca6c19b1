"""Sentences of many scripts, and the pieces where there are none."""

import random
import re
import unicodedata

import pytest

from drama.augment.sentences import length, pieces, split_sentences

SPLIT = {
    "English": ["Bees store honey.", "Do they? Yes!", "Magma rises…"],
    "quotes": ['He said "stop."', "Then (it ended.)", "All went home."],
    "abbreviations": ["Dr. A. Smith saw e.g. 3.5 bees vs. the U.S. army at approx. 5.", "Good."],
    "German": ["Die Bienen kamen bzw. flogen.", "Über dem Feld, z.B. im Mai, lag Nebel."],
    "Russian": ["Пчёлы делают мёд.", "Река течёт к морю!"],
    "Chinese": ["蜜蜂储存蜂蜜。", "真的吗？", "他说：“走吧。”", "大家回家了！"],
    "Japanese": ["蜂は蜜を蓄える。", "「本当に？」", "はい。"],
    "Hindi": ["मधुमक्खियाँ शहद बनाती हैं।", "नदी समुद्र की ओर बहती है॥"],
    "Arabic": ["النحل يخزن العسل.", "هل هذا صحيح؟", "نعم!"],
    "Urdu": ["شہد کی مکھیاں شہد بناتی ہیں۔", "دریا بہتا ہے۔"],
    "Armenian": ["Մեղուները մեղր են պատրաստում։", "Գետը հոսում է։"],
    "Amharic": ["ንቦች ማር ይሠራሉ።", "ወንዙ ይፈስሳል።"],
    "Burmese": ["ပျားများသည် ပျားရည်စုဆောင်းသည်။", "မြစ်စီးသည်။"],
}  # fmt: skip
JOINED = {"Chinese": "", "Japanese": ""}
THAI = (
    "ผึ้งเก็บน้ำผึ้งไว้ในรังเพื่อใช้เป็นอาหารในฤดูหนาว แม่น้ำไหลลงสู่ทะเลผ่านทุ่งนาและป่าไม้ "
    "ดวงจันทร์ดึงน้ำในมหาสมุทรทำให้เกิดน้ำขึ้นน้ำลงทุกวัน ขนมปังขึ้นฟูเพราะยีสต์เปลี่ยนน้ำตาลเป็นแก๊ส"
)


@pytest.mark.parametrize("name", SPLIT)
def test_every_script_is_split_at_its_marks(name):
    sentences = SPLIT[name]
    want = [part for item in sentences for part in re.split(r"(?<=Do they\?) ", item)]
    assert split_sentences(JOINED.get(name, " ").join(sentences)) == want


def test_paragraphs_end_a_sentence_and_lines_do_not():
    assert split_sentences("A title\n\nwrapped over\ntwo lines. 2.5 km\r\n \r\nend") == [
        "A title", "wrapped over two lines.", "2.5 km", "end",
    ]  # fmt: skip
    assert split_sentences(" \n ") == []


def test_thai_falls_back_to_runs_of_phrases_and_letters():
    found = pieces(THAI, 20, 100)
    assert len(found) > 1
    assert "".join(found).replace(" ", "") == THAI.replace(" ", "")
    assert all(20 <= length(piece) <= 100 for piece in found)
    unbroken = THAI.replace(" ", "")
    found = pieces(unbroken, 10, 40)
    assert "".join(found) == unbroken
    for piece in found:
        assert length(piece) <= 40
        assert not unicodedata.category(piece[0]).startswith("M")


def test_a_text_of_one_sentence_gives_a_part_of_it():
    text = "The pull of the moon and the sun, which is strong, moves the water of the oceans."
    found = pieces(text, 10, 300)
    assert found
    assert all(piece in text and length(piece) <= length(text) // 2 for piece in found)
    assert found[1] == "which is strong"  # cut at the commas, without them
    assert pieces("Short one.", 20, 300) == []
    assert pieces("", 1, 300) == []


def test_wide_characters_count_as_three():
    assert length("bee 蜜蜂 한국") == 4 + 6 + 1 + 6
    assert pieces("蜜蜂储存蜂蜜。蜂。", 20, 300) == ["蜜蜂储存蜂蜜。"]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_fit_and_come_out_of_the_text(seed):
    draw = random.Random(seed)
    marks = [". ", ", ", "。", " ", "; ", "\n\n", "! ", "ा", "；"]
    for _ in range(60):
        words = ("".join(draw.choices("abcdé蜜蜂ह", k=draw.randint(1, 30))) for _ in range(40))
        text = "".join(word + draw.choice(marks) for word in words)
        least, most = draw.randint(1, 30), draw.randint(30, 90)
        flat, at = " ".join(text.split()), 0
        for piece in pieces(text, least, most):
            assert least <= length(piece) <= most
            at = flat.index(piece, at) + len(piece)  # in order, and none overlaps
