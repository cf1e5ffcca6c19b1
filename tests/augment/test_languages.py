from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drama.augment.languages import NAMES, contradicts, differs, language_code

# (a document, a query): the languages of XQuAD and two in letters of their own, then two that are
# easily taken for one of these
TEXTS = {
    "ar": ("تسقط الأوراق في الخريف لأن الشجرة توفر الماء حتى يعود الربيع.", "لماذا تسقط الأوراق؟"),
    "de": (
        "Im Herbst fallen die Blätter, weil der Baum Wasser spart, bis es wieder Frühling wird.",
        "Warum verlieren die Bäume im Herbst ihre Blätter?",
    ),
    "el": ("Το φθινόπωρο πέφτουν τα φύλλα, γιατί το δέντρο κρατάει νερό.", "Γιατί πέφτουν;"),
    "en": (
        "In autumn the leaves fall, because the tree saves its water until it is spring again.",
        "why do trees lose their leaves in the autumn",
    ),
    "es": (
        "En otoño caen las hojas porque el árbol guarda el agua hasta que vuelve la primavera.",
        "¿Por qué pierden los árboles las hojas en el otoño?",
    ),
    "hi": ("पतझड़ में पत्ते गिरते हैं क्योंकि पेड़ पानी बचाता है।", "पत्ते क्यों गिरते हैं?"),
    "ro": (
        "Toamna cad frunzele, pentru că pomul păstrează apa până când vine din nou primăvara.",
        "De ce își pierd pomii frunzele când vine toamna?",
    ),
    "ru": ("Осенью листья падают, потому что дерево бережёт воду.", "Почему падают листья?"),
    "th": ("ใบไม้ร่วงในฤดูใบไม้ร่วงเพราะต้นไม้เก็บน้ำไว้", "ทำไมใบไม้จึงร่วง"),
    "tr": (
        "Sonbaharda yapraklar düşer, çünkü ağaç suyu bahar gelene kadar saklar ve bir daha açar.",
        "Ağaçlar sonbaharda neden yapraklarını kaybeder ve ne zaman açar?",
    ),
    "vi": (
        "Vào mùa thu lá rụng vì cây giữ nước cho đến khi mùa xuân trở lại với những cơn mưa.",
        "Tại sao cây rụng lá vào mùa thu?",
    ),
    "zh": ("秋天树叶落下，因为树要把水留到春天再用。", "为什么树叶会落下？"),
    "ja": ("秋には木が水をためておくために葉が落ちる。", "なぜ葉が落ちるのですか"),
    "ko": ("가을에는 나무가 물을 아끼려고 잎을 떨어뜨린다.", "잎은 왜 떨어지나요?"),
    "fr": (
        "En automne les feuilles tombent, parce que l'arbre garde son eau jusqu'au printemps.",
        "Pourquoi les arbres perdent-ils leurs feuilles en automne ?",
    ),
    "pt": (
        "No outono as folhas caem, porque a árvore guarda a água até que volte a primavera.",
        "Por que as árvores perdem as folhas no outono?",
    ),
}
# all characters of a Chinese query may be Japanese
CHECKED = [pair for pair in permutations([*TEXTS][:14], 2) if pair != ("ja", "zh")]


@pytest.mark.parametrize("language", TEXTS)
def test_a_query_in_the_document_s_language_stays(language):
    document, query = TEXTS[language]
    assert not differs(query, document)
    assert not contradicts(document, language)
    assert not contradicts(query, language)


@pytest.mark.parametrize(("language", "other"), CHECKED)
def test_a_query_in_another_language_is_noticed(language, other):
    document, query = TEXTS[language][0], TEXTS[other][1]
    assert differs(query, document)
    assert contradicts(TEXTS[other][0], language)


@pytest.mark.parametrize(
    ("query", "document"),
    [
        ("Tim Berners-Lee", TEXTS["th"][0]),  # names keep their letters
        ("Scott Robinson とは", TEXTS["ja"][0]),
        ("gradient descent", "梯度下降（gradient descent）是机器学习中最常用的优化方法之一。"),
        ("什么是 DistributedDataParallel？", "它把模型复制到每个设备上，并且同步梯度。"),
        ("α-synuclein", TEXTS["en"][0]),
        ("photosynthesis rate", TEXTS["de"][0]),  # no small word: nothing to tell by
        ("OK", TEXTS["zh"][0]),
        ("", TEXTS["en"][0]),
        ("warum fallen Blätter", "Laub"),
        ("why do leaves fall", "2023: 5, 7 | 2024: 6, 8"),
        ("Hvorfor mister træerne deres blade om efteråret?", "Om efteråret falder bladene."),
        ("为什么树叶会落下", TEXTS["ja"][0]),
    ],
)
def test_when_in_doubt_nothing_is_said(query, document):
    assert not differs(query, document)


def test_english_beside_a_term_of_the_document_is_noticed():
    assert differs("What is 秋天 about", TEXTS["zh"][0])


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text(), st.sampled_from(["", "xx", *NAMES]))
def test_no_text_raises(text, reference, language):
    assert differs(text, reference) in (True, False)
    assert contradicts(text, language) in (True, False)
    assert not differs(text, text)
    assert not contradicts(text, "xx")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("German", "de"), ("german (Germany)", "de"), ("de-DE", "de"), ("zh_CN", "zh"),
        ("Chinese (Simplified)", "zh"), (" English ", "en"), ("diabetes", ""), ("", ""),
    ],
)  # fmt: skip
def test_languages_are_known_by_name_and_code(name, code):
    assert language_code(name) == code
