"""Sentences about the small world: events told in several ways, opinions, and ways to spoil a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fusionlab.data.writing.words import (
    BLAME,
    DEEDS,
    DEGREES,
    PEOPLE,
    PLACES,
    PRAISE,
    QUALITIES,
    STEMS,
    SUBJECTS,
    THINGS,
    TIMES,
)

Item = TypeVar("Item")
Rng = np.random.Generator


def pick(rng: Rng, items: Sequence[Item]) -> Item:
    """One of ``items``."""
    return items[int(rng.integers(len(items)))]


def other(rng: Rng, items: Sequence[Item], than: Item) -> Item:
    """One of ``items`` that is not ``than``."""
    return pick(rng, [item for item in items if item != than])


def chance(rng: Rng, probability: float) -> bool:
    """True with this probability."""
    return bool(rng.random() < probability)


@dataclass(frozen=True)
class Event:
    """Somebody did something to a thing; place, time and the person's quality are told where given.

    Person, deed and thing are tuples of synonyms.
    """

    person: tuple[str, ...]
    deed: tuple[str, ...]
    thing: tuple[str, ...]
    place: str | None = None
    time: str | None = None
    quality: str | None = None


def any_event(rng: Rng, place: float = 0.5, time: float = 0.3, quality: float = 0.3) -> Event:
    """A random event that has each optional part with the given probability."""
    return Event(
        pick(rng, PEOPLE),
        pick(rng, DEEDS),
        pick(rng, THINGS),
        pick(rng, PLACES) if chance(rng, place) else None,
        pick(rng, TIMES) if chance(rng, time) else None,
        pick(rng, pick(rng, QUALITIES)) if chance(rng, quality) else None,
    )


def altered(rng: Rng, event: Event) -> Event:
    """The event with another person, deed or thing."""
    match int(rng.integers(3)):
        case 0:
            return replace(event, person=other(rng, PEOPLE, event.person))
        case 1:
            return replace(event, deed=other(rng, DEEDS, event.deed))
        case _:
            return replace(event, thing=other(rng, THINGS, event.thing))


def tell(rng: Rng, event: Event, *, passive: float = 0.3, fronted: float = 0.3) -> str:
    """The event as a sentence without its full stop: active or passive, place and time first or last."""
    person = f"the {event.quality} {pick(rng, event.person)}" if event.quality else f"the {pick(rng, event.person)}"
    deed, thing = pick(rng, event.deed), f"the {pick(rng, event.thing)}"
    core = f"{thing} was {deed} by {person}" if chance(rng, passive) else f"{person} {deed} {thing}"
    first, last = [], []
    for part in (event.place, event.time):
        if part:
            (first if not first and chance(rng, fronted) else last).append(part)
    return " ".join([*(f"{part} ," for part in first), core, *last])


def denied(rng: Rng, event: Event) -> str:
    """That the event did not happen."""
    person = f"the {event.quality} {pick(rng, event.person)}" if event.quality else f"the {pick(rng, event.person)}"
    deed, thing = pick(rng, event.deed), f"the {pick(rng, event.thing)}"
    return f"{person} {pick(rng, (f'did not {STEMS[deed]}', f'never {deed}'))} {thing}"


def spoiled(rng: Rng, sentence: str) -> str:
    """The sentence with one fault that no speaker would make: words swapped, dropped, doubled or wrongly inflected."""
    words = sentence.split()
    articles = [i for i, word in enumerate(words[:-1]) if word == "the"]
    verbs = [i for i, word in enumerate(words) if word in STEMS]
    at = pick(rng, articles)
    match int(rng.integers(5)):
        case 0:
            words[at], words[at + 1] = words[at + 1], words[at]
        case 1:
            words.insert(at, "the")
        case 2:
            del words[verbs[0]]
        case 3:
            words[verbs[0]] = (
                f"was {STEMS[words[verbs[0]]]}" if words[verbs[0] - 1] != "was" else STEMS[words[verbs[0]]]
            )
        case _:
            words.insert(verbs[0] + 1, pick(rng, ("of", "is", "and", "them")))
    return " ".join(words)


def opinion(rng: Rng, positive: bool, subject: str | None = None) -> str:
    """A clause that praises or blames, of any subject by default; a negated one says the opposite of its adjective."""
    subject, negated = subject or pick(rng, SUBJECTS), chance(rng, 0.3)
    adjective = pick(rng, PRAISE if positive != negated else BLAME)
    if negated:
        return f"the {subject} was {pick(rng, ('not', 'never', 'hardly'))} {adjective}"
    degree = f"{pick(rng, DEGREES)} " if chance(rng, 0.5) else ""
    return pick(rng, (f"the {subject} was {degree}{adjective}", f"i found the {subject} {degree}{adjective}"))


def review(rng: Rng, positive: bool) -> str:
    """A short review: an exclamation, two clauses that agree, or a concession followed by the verdict."""
    match int(rng.integers(3)):
        case 0:
            exclaimed = f"what a {pick(rng, PRAISE if positive else BLAME)} {pick(rng, SUBJECTS)}"
            return f"{exclaimed} , {opinion(rng, positive)}"
        case 1:
            return f"{opinion(rng, positive)} and {opinion(rng, positive)}"
        case _:
            return f"although {opinion(rng, not positive)} , {opinion(rng, positive)}"
