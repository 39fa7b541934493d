"""VQA accuracy: how many of ten people gave the answer, as the VQA challenges count it.

An answer is fully right if three of the nine others said it, whichever of the ten is left out:

    accuracy = mean over the people of min(1, others with this answer / 3)

Both sides are made alike first: lower case, no articles, number words as digits, no punctuation
but within numbers, an apostrophe that a contraction lacks put back.

Source: Antol et al., VQA: Visual Question Answering, ICCV 2015, section 5; normalisation, with its
words: that of the challenge's evaluation page and script (vqaEval.py). The script leaves it out
where all ten people said the same letter by letter; the page does not say so, and here it is done.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

FULL = 3  # people who agree on what is fully right
ARTICLES = {"a", "an", "the"}
_WORDS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't "
    "mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've "
    "should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've "
    "you'd you'd've you'll you're you've"
).split()


def _contractions() -> dict[str, str]:
    """Each word by how it is written with one apostrophe missing: hadnt've and hadn'tve."""
    found = {"somebody'd": "somebodyd"}  # the one that the challenge writes without
    for word in _APOSTROPHES:
        places = (place for place, letter in enumerate(word) if letter == "'")
        found |= {word[:place] + word[place + 1 :]: word for place in places}
    return found


CONTRACTIONS = _contractions()
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer, 0 to 1, by all people's answers, repeated ones too.

    Of fewer than four answers none could be fully right: there 1 for any of them.
    """
    said = normalise(prediction)
    matches = [normalise(answer) == said for answer in answers]
    total = sum(matches)
    if len(answers) <= FULL:
        return float(total > 0)
    return sum(min(1.0, (total - match) / FULL) for match in matches) / len(matches)


@lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """Make an answer comparable: "The two  dogs." is "2 dogs"."""
    text = _without_punctuation(" ".join(text.split()))
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a blank goes, one between words becomes a blank; all go from 1,000."""
    has_number_comma = _NUMBER_COMMA.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        is_loose = f"{mark} " in text or f" {mark}" in text or has_number_comma
        plain = plain.replace(mark, "" if is_loose else " ")
    return _LOOSE_PERIOD.sub("", plain)
