"""Is a text in another language than it should be? A cheap check that is silent when in doubt.

By Unicode script first; among languages in Latin letters by their most frequent small words. A word
that several languages share counts for each of them by its share.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from typing import NamedTuple

NAMES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew",
    "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "mr": "Marathi",
    "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese",
}  # fmt: skip
# languages in other letters than Latin ones
_SCRIPTS = {
    **dict.fromkeys(("ar", "fa", "ur"), frozenset({"ARABIC"})),
    **dict.fromkeys(("bg", "ru", "uk"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("hi", "mr"), frozenset({"DEVANAGARI"})),
    "bn": frozenset({"BENGALI"}),
    "el": frozenset({"GREEK"}),
    "he": frozenset({"HEBREW"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL", "CJK"}),
    "sr": frozenset({"CYRILLIC", "LATIN"}),
    "ta": frozenset({"TAMIL"}),
    "te": frozenset({"TELUGU"}),
    "th": frozenset({"THAI"}),
    "zh": frozenset({"CJK", "BOPOMOFO"}),
}
# without any of these letters a longer text is Chinese
_BESIDE_CHINESE = {"ja": {"HIRAGANA", "KATAKANA"}, "ko": {"HANGUL"}}
_LATIN = frozenset({"LATIN"})
# frequent small words, of many languages lest one be taken for another. Danish stands for
# Norwegian too, Indonesian for Malay, Czech for Slovak.
_SMALL_WORDS = {
    "en": "the of and to in is was for that on with as by it from at are this be has have which "
    "or were an had but not their what how why who when where does did can you your i do "
    "will would about there been its they we my",
    "de": "der die das und ist in den von zu mit sich des auf für im dem nicht ein eine als auch "
    "es an werden aus er hat dass sie nach wird bei einer um am sind noch wie einem über "
    "einen so zum war haben nur oder aber vor zur bis mehr durch man was wer wann warum "
    "welche welcher welches kann ich wir gibt wo mein wurde wurden",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero "
    "sus le ha me si sin sobre este ya entre cuando todo esta ser son dos también fue "
    "había era muy años hasta desde está qué cómo cuál quién dónde cuándo cuáles puedo hay "
    "mi cuántos nos porque",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce "
    "il sont la avec son aux d l qu n s c ou je nous mais cette été ont leur comment quel "
    "quelle quels pourquoi où quand quoi vous mon à être ses elle fait sans entre peut",
    "it": "di e il la che in a per un è del con non una i le da sono si al dei come lo nel più "
    "della delle ha gli alla ma anche su dal questo dalla nella l o cosa quale quali "
    "perché quando dove chi qual mi essere stato stata hanno ai degli dell d mio",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi "
    "ao ele das tem à seu sua ou ser quando muito há nos já está eu também só pelo pela "
    "até isso qual quem onde são às meu minha quais você pode num",
    "ro": "de și în a la cu care din pe un o nu este să pentru se mai fi sunt ce au lui prin dar "
    "după cel ca sau al ale între fost era cum când unde cât cine care sa ai despre "
    "această acest aceste dintre până i s l să iar fără câte câți poate am va despre",
    "nl": "de het een van en in is dat op te zijn met voor niet aan er om ook als door maar bij "
    "nog die uit naar dan of wordt werd was over wat hoe waarom welke wie wanneer waar kan "
    "ik mijn je hebben heeft deze tot tegen onder geen worden",
    "sv": "och i att en det som på är av för med till den har de inte om ett men var från vid så "
    "kan hade ska eller efter än vad hur varför vilken vilka när vem jag min mina nu över "
    "bara under sig man blev sin",
    "da": "og i at en det som på er af for med til den har de ikke om et men var fra ved så kan "
    "havde skal eller efter end hvad hvordan hvorfor hvilken hvilke når hvem jeg min nu "
    "over kun under sig blev sin hvor være mot etter hva hvorfor ble også",
    "fi": "ja on ei se että oli hän joka mutta myös kun ovat tai kuin ole niin mitä miten miksi "
    "missä kuka milloin mikä voi ollut jos sen mukaan vain nyt kuinka jonka jotka tämä "
    "olla sitä hänen",
    "pl": "i w na z się do nie to jest że o od po dla jak przez co ale za są oraz tym czy był "
    "być go ze jego który która które można gdzie kiedy dlaczego kto ile jakie jaki jaka "
    "mnie moje została",
    "cs": "a se v na je že s z do o k i to ve za si pro ale po jako jsou jeho co od byl by které "
    "který která nebo než však jak proč kdy kde kdo není jsem můj může při bylo kolik jaké "
    "jaká sa ktoré ktorý aj sú čo ako",
    "hu": "a az és hogy nem is egy van volt ez meg de csak mint már el még azt amely ki vagy "
    "lehet mit mi hogyan miért mikor hol milyen melyik mennyi szerint után ezt kell nincs "
    "amit",
    "tr": "ve bir bu da de için ile olarak çok daha o gibi olan en ne kadar sonra var ancak ise "
    "ya mi her olduğu tarafından nedir nasıl neden hangi kim nerede zaman ben değil kaç mı "
    "mu oldu edilen bunu göre hangisi",
    "vi": "và của là có trong được các cho một không người với những để này đã như đến từ khi "
    "tại về ở ra đó vào cũng theo nhiều gì nào thế sao bao nhiêu ai đâu tôi bằng cách hơn "
    "làm sẽ năm bị",
    "id": "yang dan di untuk dengan dari pada ini dalam itu tidak adalah ke akan oleh sebagai "
    "juga telah atau karena ada bisa dapat apa bagaimana mengapa kapan siapa mana saya "
    "mereka seorang tersebut para lebih sudah tahun berapa kepada",
    "sw": "ya na wa kwa ni katika za la kama hii huo cha au kuwa lakini hiyo yake yao huu pia "
    "nini kwamba zaidi watu vipi wapi gani nani lini jinsi hiyo hayo mimi yangu alisema",
    "yo": "ní ti tí sí àti ó wọn fún náà pé kan láti ń jẹ́ bí kò ohun nínú yìí a rẹ̀ àwọn ṣe lè "
    "gbà",
}  # fmt: skip
# letters that hardly any other language in Latin letters has
_OWN_LETTERS = {
    letter: language
    for language, letters in {
        "cs": "řů", "de": "ß", "es": "ñ", "hu": "őű", "pl": "łę", "ro": "țș", "tr": "ğı",
        "vi": "ơưđ",
    }.items()
    for letter in letters
}  # fmt: skip
_UNSPACED = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}
_WORDS: dict[str, dict[str, float]] = {}
for _language, _words in _SMALL_WORDS.items():
    for _word in set(_words.split()):
        _WORDS.setdefault(_word, {})[_language] = 1.0
for _shares in _WORDS.values():
    _shares.update({language: 1.0 / len(_shares) for language in _shares})


class _Unit(NamedTuple):
    """A word in lower case; of a script without spaces, a character."""

    word: str
    script: str
    capital: bool


def differs(text: str, reference: str) -> bool:
    """Whether `text` is clearly in another language than `reference`.

    Words of `text` that stand in `reference` too say nothing about its script: names and terms keep
    their letters.
    """
    units, around = _units(text), _units(reference)
    scripts = _main_scripts(around)
    shared = {unit.word for unit in around}
    if scripts and _foreign([unit for unit in units if unit.word not in shared], scripts):
        return True
    language = _spoken(_evidence(around))
    return language is not None and _against(language, units)


def contradicts(text: str, language: str) -> bool:
    """Whether `text` is clearly not in `language`, a code; with an unknown code it never is."""
    if language not in NAMES:
        return False
    units = _units(text)
    if _foreign(units, _SCRIPTS.get(language, _LATIN)):
        return True
    if language in _BESIDE_CHINESE and len(units) >= 15:
        return not any(unit.script in _BESIDE_CHINESE[language] for unit in units)
    return language in _SMALL_WORDS and _against(language, units)


def language_code(name: str) -> str:
    """The code of a language given by its English name or code ("German", "de-DE"), or ""."""
    word = name.strip().casefold()
    for code, known in NAMES.items():
        if word == known.casefold() or re.split(r"[-_ (]", word)[0] in (code, known.casefold()):
            return code
    return ""


def _foreign(units: list[_Unit], scripts: frozenset[str]) -> bool:
    """Whether hardly any word is in one of the scripts. Names in Latin letters go with all."""
    words = [
        unit for unit in units if unit.script in scripts or not unit.capital or unit.word in _WORDS
    ]
    own = sum(unit.script in scripts for unit in words)
    return len(words) >= 2 and own < 0.3 * len(words)


def _main_scripts(units: list[_Unit]) -> frozenset[str]:
    """The scripts that a text is written in, or none if it is too short to tell."""
    counts = Counter(unit.script for unit in units)
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.05 * len(units):
        return _SCRIPTS["ja"]
    frequent = frozenset(script for script, count in counts.items() if count >= 0.2 * len(units))
    return frequent if len(units) >= 5 else frozenset()


def _evidence(units: list[_Unit]) -> dict[str, float]:
    """How much the small words and letters of a text speak for each language in Latin letters.

    A text that is mostly in other letters speaks for none.
    """
    scores: dict[str, float] = {}
    words = {unit.word for unit in units if unit.script == "LATIN"}
    if len(words) < 0.7 * len({unit.word for unit in units}):
        return scores
    for word in words:
        shares = [*_WORDS.get(word, {}).items()]
        shares += [
            (language, 0.5)
            for language in {_OWN_LETTERS.get(letter) for letter in word}
            if language
        ]
        for language, share in shares:
            scores[language] = scores.get(language, 0.0) + share
    return scores


def _spoken(scores: dict[str, float]) -> str | None:
    """The language that the evidence clearly speaks for."""
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    (first, best), (_, second) = [*ranked, ("", 0.0), ("", 0.0)][:2]
    return first if best >= max(1.5, 2 * second) else None


def _against(language: str, units: list[_Unit]) -> bool:
    """Whether a text clearly speaks for another language in Latin letters, and not for this one."""
    scores = _evidence(units)
    found = _spoken(scores)
    if found is None or found == language:
        return False
    return 4 * scores.get(language, 0.0) <= scores[found]


def _units(text: str) -> list[_Unit]:
    units: list[_Unit] = []
    start, script = 0, ""
    text = unicodedata.normalize("NFC", text)
    for place, char in enumerate(f"{text} "):
        now = _script(char)
        if now == "INHERITED" and script:
            continue
        if now != script or script in _UNSPACED:
            if script and script != "INHERITED":
                word = text[start:place]
                units.append(_Unit(word.lower(), script, script == "LATIN" and word[0].isupper()))
            start, script = place, now
    return units


@cache
def _script(char: str) -> str:
    """The script of a letter, "INHERITED" of a mark on a letter, "" of anything else."""
    category = unicodedata.category(char)
    if category[0] == "M":
        return "INHERITED"
    if category[0] != "L":
        return ""
    name = unicodedata.name(char, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    return re.split(r"[ -]", name, maxsplit=1)[0]
