"""Texts for pretraining tiny-t5: gaps to fill in, sentences to rewrite and compare, and the embedded tasks' questions.

Most answers are dense, several words that each need one part of the text, so that synonyms, roles and what matches what
are learned from every text; the questions of one word come on top, in other words and with other answers than the
tasks' own. The tasks' own formats come up only seldom and mixed up, with the answer given away; their field names, late
in training, in front of any text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from fusionlab.data.writing import WRITTEN_TASKS, forms
from fusionlab.data.writing.sentences import (
    Event,
    Rng,
    altered,
    any_event,
    chance,
    opinion,
    pick,
    review,
    spoiled,
    tell,
)
from fusionlab.data.writing.words import PLACES, QUESTIONS, SKILLS, SUBJECTS, THINGS

Sample: TypeAlias = tuple[str, str]
MAX_GAPS = 3
FIELDS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"))
HEADS = ("in short : ", "mend : ", "well formed ? ", "does the writer like it ? ")
ASKED = ("how", "why", "where", "when", "price")  # short for the rows of QUESTIONS


def related(rng: Rng, event: Event) -> Event:
    """The event with none to three of its parts exchanged, place included."""
    for _ in range(int(rng.integers(3))):
        event = altered(rng, event)
    return replace(event, place=pick(rng, PLACES)) if event.place and chance(rng, 0.3) else event


def parts(event: Event) -> list[str]:
    """Person, deed, thing, and the place if told, in one canonical word each."""
    return [event.person[0], event.deed[0], event.thing[0], *(event.place.split()[-1:] if event.place else ())]


def two_events(rng: Rng) -> tuple[Event, Event]:
    """An event and a related one, both with a place or both without."""
    event = any_event(rng, time=0.1, quality=0.1)
    return event, related(rng, event)


def question(rng: Rng, about: str, row: int) -> tuple[str, list[str]]:
    """A question of a row of QUESTIONS and its parts."""
    action, _, thing = about.split()
    return pick(rng, QUESTIONS[row]).format(about), [ASKED[row], action, thing]


def two_questions(rng: Rng) -> list[tuple[str, list[str]]]:
    """Two questions that share way, deed or thing more often than by chance."""
    first, row = pick(rng, SKILLS), int(rng.integers(len(QUESTIONS)))
    second = pick(rng, SKILLS) if chance(rng, 0.3) else first
    return [question(rng, first, row), question(rng, second, row if chance(rng, 0.6) else int(rng.integers(5)))]


def hidden(rng: Rng, words: list[str], rate: float) -> tuple[list[str], list[str]]:
    """Words with runs of them replaced by sentinels, and what those hide; at least one run."""
    source, target, at, gap = [], [], 0, 0
    while at < len(words):
        if gap < MAX_GAPS and chance(rng, rate):
            length = int(rng.integers(1, 4))
            source.append(f"<extra_id_{gap}>")
            target += [f"<extra_id_{gap}>", *words[at : at + length]]
            at, gap = at + length, gap + 1
        else:
            source.append(words[at])
            at += 1
    return (source, [*target, f"<extra_id_{gap}>"]) if gap else hidden(rng, words, rate)


def gaps(rng: Rng) -> Sample:
    """T5's span corruption of a sentence that follows its paraphrase, or of a review or a question alone."""
    if chance(rng, 0.65):
        event = any_event(rng)
        source, target = hidden(rng, f"{tell(rng, event)} .".split(), 0.3)
        return f"{tell(rng, event)} . {' '.join(source)}", " ".join(target)
    text = f"{review(rng, chance(rng, 0.5))} ." if chance(rng, 0.5) else question(rng, pick(rng, SKILLS), 0)[0]
    source, target = hidden(rng, text.split(), 0.15)
    return " ".join(source), " ".join(target)


def in_short(rng: Rng) -> Sample:
    """One or two events in canonical words."""
    events = [any_event(rng) for _ in range(2 if chance(rng, 0.3) else 1)]
    told = " and ".join(tell(rng, event) for event in events)
    return f"in short : {told} .", " and ".join(" ".join(parts(event)) for event in events)


def aligned(rng: Rng) -> Sample:
    """Two texts part by part, in canonical words."""
    if chance(rng, 0.25):
        (first, a), (second, b) = two_questions(rng)
    else:
        one, two = two_events(rng)
        first, second, a, b = f"{tell(rng, one)} .", f"{tell(rng, two)} .", parts(one), parts(two)
    return f"align : {first} | {second}", " ".join(f"{x} {y}" for x, y in zip(a, b, strict=True))


def compared(rng: Rng) -> Sample:
    """Which parts of two texts are the same."""
    if chance(rng, 0.25):
        (first, a), (second, b) = two_questions(rng)
    else:
        one, two = two_events(rng)
        first, second, a, b = f"{tell(rng, one)} .", f"{tell(rng, two)} .", parts(one), parts(two)
    same = " ".join("same" if x == y else "other" for x, y in zip(a, b, strict=True))
    return f"compare : {first} | {second}", same


def news(rng: Rng) -> Sample:
    """What the second of two texts tells that the first does not, in canonical words."""
    if chance(rng, 0.2):
        (first, a), (second, b) = two_questions(rng)
    else:
        one, two = two_events(rng)
        more = any_event(rng, time=0, quality=0)
        first, second, a, b = f"{tell(rng, one)} .", f"{tell(rng, two)} .", parts(one), parts(two)
        if chance(rng, 0.3):
            first, a = f"{tell(rng, more)} and {tell(rng, one)} .", [*parts(more), *a]
    return f"news : {first} | {second}", " ".join(word for word in b if word not in a) or "none"


def verdict(rng: Rng) -> Sample:
    """What one clause of a review thinks of its subject."""
    subjects = [SUBJECTS[i] for i in rng.permutation(len(SUBJECTS))[: int(rng.integers(1, 4))]]
    praised = [chance(rng, 0.5) for _ in subjects]
    told = [opinion(rng, praise, subject) for praise, subject in zip(praised, subjects, strict=True)]
    at = int(rng.integers(len(told)))
    return f"{' , '.join(told)} . what of the {subjects[at]} ?", ("bad", "good")[praised[at]]


def mended(rng: Rng) -> Sample:
    """A sentence with a fault or none, and the sound one."""
    sentence = tell(rng, any_event(rng, place=0.3, time=0.2, quality=0.2))
    return f"mend : {spoiled(rng, sentence) if chance(rng, 0.8) else sentence} .", sentence


def formed(rng: Rng, write: Callable[[Rng, int], tuple[str, ...]], template: str, answers: tuple[str, ...]) -> Sample:
    """A question about texts in the forms of an embedded task; ``answers`` are in its label order."""
    label = int(rng.integers(len(answers)))
    return template.format(*write(rng, label)), answers[label]


def sound(rng: Rng) -> Sample:
    return formed(rng, forms.acceptability, "well formed ? {}", ("wrong", "right"))


def opinion_of(rng: Rng) -> Sample:
    """What the writer of a review thinks."""
    return formed(rng, forms.sentiment, "does the writer like it ? {}", ("bad", "good"))


def same_deed(rng: Rng) -> Sample:
    return formed(rng, forms.paraphrase, "do both tell the same ? {} | {}", ("other", "same"))


def same_question(rng: Rng) -> Sample:
    return formed(rng, forms.duplicate, "do both ask the same ? {} | {}", ("other", "same"))


def follows(rng: Rng) -> Sample:
    return formed(rng, forms.entailment, "{} so : {}", ("true", "false"))


def certain(rng: Rng) -> Sample:
    return formed(rng, forms.inference, "{} is it so that {}", ("yes", "maybe", "no"))


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
        answer = f"{pick(rng, forms.SCORES):.1f}"
    else:
        label = int(rng.integers(len(task.label_words)))
        answer = pick(rng, task.label_words)
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
    """A question about who did something or what was done to something, the answer in canonical words."""
    events = [any_event(rng, time=0, quality=0.2), any_event(rng, time=0, quality=0.2)]
    text = " and ".join(tell(rng, event, fronted=0) for event in events)
    about = pick(rng, events)
    if chance(rng, 0.5):
        return f"{text} . who {pick(rng, about.deed)} the {pick(rng, about.thing)} ?", about.person[0]
    return f"{text} . what was {pick(rng, about.deed)} by the {pick(rng, about.person)} ?", about.thing[0]


MIXTURE: tuple[tuple[Callable[[Rng], Sample], float], ...] = (
    (gaps, 0.13),
    (in_short, 0.1),
    (aligned, 0.08),
    (compared, 0.1),
    (news, 0.09),
    (verdict, 0.05),
    (mended, 0.06),
    (common_word, 0.03),
    (asked, 0.05),
    (sound, 0.06),
    (opinion_of, 0.03),
    (same_deed, 0.06),
    (same_question, 0.03),
    (follows, 0.05),
    (certain, 0.04),
    (alike, 0.03),
    (borrowed, 0.01),
)


def any_sample(rng: Rng) -> Sample:
    """One input and its target, drawn from the mixture, as the functions above put it."""
    draw, total = rng.random(), 0.0
    for write, share in MIXTURE:
        total += share
        if draw < total:
            return write(rng)
    return gaps(rng)


def in_fields(rng: Rng, source: str) -> str:
    """A question about one or two texts with the tasks' field names in front of them; other sources as they are."""
    for mark in (" | ", " so : ", " is it so that "):
        first, found, second = source.partition(mark)
        if found:
            head, first = (mark.strip(" :"), first) if mark != " | " else _split(first)
            one, two = pick(rng, FIELDS)
            return f"{head} {one}: {first} {two}: {second}"
    if source.startswith(HEADS):
        head, text = _split(source)
        return f"{head} sentence: {text}"
    return source


def _split(source: str) -> tuple[str, str]:
    """What is asked, and of which text."""
    end = min(at for at in (source.find(" : "), source.find(" ? ")) if at >= 0)
    return source[:end], source[end + 3 :]


def varied_sample(rng: Rng) -> Sample:
    """As :func:`any_sample`, half of the texts in fields."""
    source, target = any_sample(rng)
    return (in_fields(rng, source) if "answer : " not in source and chance(rng, 0.5) else source), target
