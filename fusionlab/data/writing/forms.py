"""How a sample of each written task is made: one function a task, from a class (or what is shared) to its texts."""

from __future__ import annotations

from dataclasses import replace

from fusionlab.data.writing.sentences import (
    Event,
    Rng,
    altered,
    any_event,
    chance,
    denied,
    other,
    pick,
    review,
    spoiled,
    tell,
)
from fusionlab.data.writing.words import DEEDS, KINDS, PEOPLE, PLACES, QUALITIES, QUESTIONS, SKILLS, THINGS, TIMES

PARTS = 4
SCORES = (0.0, 1.2, 2.5, 3.8, 5.0)
"""The similarity of two sentences by how many of person, deed, thing and place they share."""


def similarity_score(shared: int) -> float:
    """The score of two sentences that share the parts whose bits are set in ``shared``."""
    return SCORES[shared.bit_count()]


def acceptability(rng: Rng, label: int) -> tuple[str, ...]:
    """0: a sentence with a fault, 1: a sound one."""
    sentence = tell(rng, any_event(rng))
    return (f"{sentence if label else spoiled(rng, sentence)} .",)


def sentiment(rng: Rng, label: int) -> tuple[str, ...]:
    """0: blame, 1: praise."""
    return (f"{review(rng, bool(label))} .",)


def paraphrase(rng: Rng, label: int) -> tuple[str, ...]:
    """0: the second sentence tells of another person, deed or thing, 1: the same in other words."""
    event = any_event(rng, time=0)
    first, second = tell(rng, event), tell(rng, event if label else altered(rng, event))
    while first == second:
        second = tell(rng, event, passive=0.6)
    return f"{first} .", f"{second} ."


def duplicate(rng: Rng, label: int) -> tuple[str, ...]:
    """0: another question about the thing, or the question about another thing, 1: the same question in other words."""
    skill, ways = pick(rng, SKILLS), pick(rng, QUESTIONS)
    way = pick(rng, ways)
    if label:
        return way.format(skill), other(rng, ways, way).format(skill)
    if chance(rng, 0.5):
        return way.format(skill), pick(rng, ways).format(other(rng, SKILLS, skill))
    return way.format(skill), pick(rng, other(rng, QUESTIONS, ways)).format(skill)


def entailment(rng: Rng, label: int) -> tuple[str, ...]:
    """0: the second text follows from one half of the first, 1: it does not."""
    told, untold = [any_event(rng, time=0, quality=0.2), any_event(rng, time=0, quality=0.2)]
    halves = [tell(rng, told, fronted=0), tell(rng, untold, fronted=0)]
    premise = " and ".join(halves[i] for i in rng.permutation(2))
    claim = replace(told, place=told.place if chance(rng, 0.5) else None, quality=None)
    if label:
        claim = altered(rng, claim)
    hypothesis = tell(rng, claim)
    if chance(rng, 0.3):
        hypothesis = _in_general(hypothesis)
    return f"{premise} .", f"{hypothesis} ."


def _in_general(sentence: str) -> str:
    """The sentence with things named by their kind: "the car" becomes "a vehicle"."""
    for thing, kind in KINDS.items():
        sentence = sentence.replace(f"the {thing}", f"a {kind}")
    return sentence


def inference(rng: Rng, label: int) -> tuple[str, ...]:
    """0: the second text follows from the first, 1: it may or may not be so, 2: it cannot be so."""
    event = any_event(rng, place=0.3, time=0.3, quality=0.6)
    premise = tell(rng, event)
    if event.quality and chance(rng, 0.5):
        pair = next(pair for pair in QUALITIES if event.quality in pair)
        opposite = pair[1 - pair.index(event.quality)]
        claimed = (event.quality, pick(rng, other(rng, QUALITIES, pair)), opposite)[label]
        return f"{premise} .", f"the {pick(rng, event.person)} was {claimed} ."
    plain = replace(event, place=None, time=None, quality=None)
    if label == 0:
        return f"{premise} .", f"{tell(rng, plain)} ."
    if label == 2:
        return f"{premise} .", f"{denied(rng, plain)} ."
    return f"{premise} .", f"{tell(rng, _with_news(rng, event, plain), fronted=0)} ."


def _with_news(rng: Rng, event: Event, plain: Event) -> Event:
    """``plain`` with a place or time that ``event`` does not tell."""
    if event.place is None and (event.time is not None or chance(rng, 0.5)):
        return replace(plain, place=pick(rng, PLACES))
    if event.time is None:
        return replace(plain, time=pick(rng, TIMES))
    return replace(plain, person=other(rng, PEOPLE, event.person))


def similarity(rng: Rng, shared: int) -> tuple[str, ...]:
    """Two sentences that have in common the parts whose bits are set in ``shared``."""
    event = any_event(rng, place=1, time=0, quality=0)
    changed = Event(
        event.person if shared & 1 else other(rng, PEOPLE, event.person),
        event.deed if shared & 2 else other(rng, DEEDS, event.deed),
        event.thing if shared & 4 else other(rng, THINGS, event.thing),
        event.place if shared & 8 else other(rng, PLACES, event.place),
    )
    return f"{tell(rng, event, passive=0)} .", f"{tell(rng, changed, passive=0)} ."
