"""Texts for pretraining tiny-t5: gaps to fill in, and the embedded tasks' questions in other words with other answers.

The tasks' own formats and answers come up only seldom and mixed up: their field names in front of other questions, and
their answers in a plain question about one of two words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from fusionlab.data.writing import WRITTEN_TASKS, forms
from fusionlab.data.writing.sentences import Rng, any_event, chance, pick, review, tell
from fusionlab.data.writing.words import QUESTIONS, SKILLS, THINGS

Sample: TypeAlias = tuple[str, str]
MAX_GAPS = 3


def any_text(rng: Rng) -> str:
    """A sentence or two about the world, a review or a question."""
    match int(rng.integers(4)):
        case 0:
            return f"{review(rng, chance(rng, 0.5))} ."
        case 1:
            return pick(rng, pick(rng, QUESTIONS)).format(pick(rng, SKILLS))
        case 2:
            event = any_event(rng)
            return f"{tell(rng, event)} . {tell(rng, event)} ."
        case _:
            return f"{tell(rng, any_event(rng))} ."


def gaps(rng: Rng) -> Sample:
    """T5's span corruption: one to three runs of words become sentinels, the target names what they hid."""
    words = any_text(rng).split()
    source, target, at, gap = [], [], 0, 0
    while at < len(words):
        if gap < MAX_GAPS and chance(rng, 0.15):
            length = int(rng.integers(1, 4))
            source.append(f"<extra_id_{gap}>")
            target += [f"<extra_id_{gap}>", *words[at : at + length]]
            at, gap = at + length, gap + 1
        else:
            source.append(words[at])
            at += 1
    return (" ".join(source), " ".join([*target, f"<extra_id_{gap}>"])) if gap else gaps(rng)


def sound(rng: Rng) -> Sample:
    label = int(rng.integers(2))
    (text,) = forms.acceptability(rng, label)
    return pick(rng, (f"well formed ? {text}", f"is this english right : {text}")), ("wrong", "right")[label]


def opinion_of(rng: Rng) -> Sample:
    """What the writer of a review thinks."""
    label = int(rng.integers(2))
    (text,) = forms.sentiment(rng, label)
    return pick(rng, (f"opinion : {text}", f"does the writer like it ? {text}")), ("bad", "good")[label]


def same_deed(rng: Rng) -> Sample:
    label = int(rng.integers(2))
    first, second = forms.paraphrase(rng, label)
    return f"do both tell the same ? {first} | {second}", ("different", "same")[label]


def same_question(rng: Rng) -> Sample:
    label = int(rng.integers(2))
    first, second = forms.duplicate(rng, label)
    return f"do both ask the same ? {first} | {second}", ("different", "same")[label]


def follows(rng: Rng) -> Sample:
    label = int(rng.integers(2))
    first, second = forms.entailment(rng, label)
    return f"{first} so : {second}", ("true", "false")[label]


def certain(rng: Rng) -> Sample:
    label = int(rng.integers(3))
    first, second = forms.inference(rng, label)
    return f"{first} is it so that {second}", ("yes", "maybe", "no")[label]


def alike(rng: Rng) -> Sample:
    """How many of person, deed, thing and place two sentences share."""
    shared = int(rng.integers(16))
    first, second = forms.similarity(rng, shared)
    return f"how much in common ? {first} | {second}", ("none", "little", "some", "much", "all")[shared.bit_count()]


def borrowed(rng: Rng) -> Sample:
    """A task's own question and answer format, with the answer given away: the format alone is learned."""
    task = pick(rng, list(WRITTEN_TASKS.values()))
    if task.label_words is None:
        label = int(rng.integers(16))
        answer = f"{forms.similarity_score(label):.1f}"
    else:
        label = int(rng.integers(len(task.label_words)))
        answer = task.label_words[label]
    texts = dict(zip(task.input_columns, task.write(rng, label), strict=True))
    return f"{task.template.format(**texts)} answer : {answer}", answer


def common_word(rng: Rng) -> Sample:
    """The one thing that is in both of two lists, or none."""
    things = [words[int(rng.integers(len(words)))] for words in (THINGS[i] for i in rng.permutation(len(THINGS)))]
    first, second, answer = things[:4], things[4:8], "none"
    if chance(rng, 0.8):
        answer = pick(rng, first)
        second[int(rng.integers(4))] = answer
    return f"in both : {' '.join(first)} | {' '.join(second)}", answer


def asked(rng: Rng) -> Sample:
    """A question about who did something or what was done to something, the answer in a word of the text."""
    events = [any_event(rng, time=0, quality=0.2), any_event(rng, time=0, quality=0.2)]
    told = [
        replace(e, person=(pick(rng, e.person),), deed=(pick(rng, e.deed),), thing=(pick(rng, e.thing),))
        for e in events
    ]
    text = " and ".join(tell(rng, event, fronted=0) for event in told)
    about = pick(rng, told)
    original = events[told.index(about)]
    if chance(rng, 0.5):
        return f"{text} . who {pick(rng, original.deed)} the {pick(rng, original.thing)} ?", about.person[0]
    return f"{text} . what was {pick(rng, original.deed)} by the {pick(rng, original.person)} ?", about.thing[0]


MIXTURE: tuple[tuple[Callable[[Rng], Sample], float], ...] = (
    (gaps, 0.12),
    (common_word, 0.06),
    (asked, 0.08),
    (sound, 0.1),
    (opinion_of, 0.08),
    (same_deed, 0.15),
    (same_question, 0.08),
    (follows, 0.12),
    (certain, 0.1),
    (alike, 0.08),
    (borrowed, 0.03),
)


def any_sample(rng: Rng) -> Sample:
    """One input and its target, drawn from the mixture."""
    draw, total = rng.random(), 0.0
    for write, share in MIXTURE:
        total += share
        if draw < total:
            return write(rng)
    return gaps(rng)
