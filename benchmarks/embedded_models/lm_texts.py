"""Texts that tiny-lm is pretrained on: the small world of the embedded tasks in other wordings, with other answers.

Every sample is a conversation of one or two questions. None begins as a question of the embedded tasks does, and none
has their label words for an answer, but for colours and numbers, which have no others. In a late phase their words are
among those that are copied, so that the model has heard them; what they mean is told nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from fusionlab.data.asking.questions import Rng, choose
from fusionlab.data.asking.words import BAD, COLOURS, COUNT_WORDS, FRUITS, GOOD, LEGS, NAMES, PLAIN, THINGS, TOWNS

Turn = tuple[str, str]
TASK_WORDS = (
    *COUNT_WORDS, "glad", "upset", "torn", "calm", "name", "age", "town",
    "sort", "json", "count", "legs", "mood", "table",
)  # fmt: skip
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def one(rng: Rng, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def numbers(rng: Rng, count: int) -> list[int]:
    return [int(number) for number in rng.permutation(100)[:count]]


def copying(rng: Rng) -> Turn:
    """Words again, backwards, the first, the last, or one by its place."""
    return copied(rng, (NAMES, COLOURS, FRUITS, TOWNS, tuple(map(str, range(100))))[int(rng.integers(5))])


def hearing(rng: Rng) -> Turn:
    """The same of words that the embedded tasks are asked and answered in, bare or in quotes."""
    if rng.integers(3):
        return copied(rng, TASK_WORDS)
    words = choose(rng, TASK_WORDS, int(rng.integers(1, 4)))
    return f"in quotes : {' '.join(words)}", json.dumps(words)[1:-1]


def copied(rng: Rng, pool: tuple[str, ...]) -> Turn:
    """Words of the pool again, backwards, the first, the last, or one by its place."""
    words = choose(rng, pool, int(rng.integers(2, 6)))
    place = int(rng.integers(len(words)))
    kinds = {
        "say again": " ".join(words),
        "say it with commas": ", ".join(words),
        "backwards": " ".join(words[::-1]),
        "which is first": words[0],
        "which is last": words[-1],
        f"what is at {place + 1}": words[place],
        f"what comes after {words[0]}": words[1],
    }
    ask = list(kinds)[int(rng.integers(len(kinds)))]
    return f"{ask} : {' '.join(words)}", kinds[ask]


def ordering(rng: Rng) -> Turn:
    """Numbers in order, in another wording and with commas; the smallest, the largest, the rest."""
    values = numbers(rng, int(rng.integers(2, 5)))
    ordered = sorted(values)
    kinds = {
        "put in order, small first": ", ".join(map(str, ordered)),
        "put in order, large first": ", ".join(map(str, ordered[::-1])),
        "order them and join by <": " < ".join(map(str, ordered)),
        "which is the smallest": str(ordered[0]),
        "which is the largest": str(ordered[-1]),
        "which comes next to the smallest": str(ordered[1]),
    }
    weights = np.array([4, 1, 3, 1, 1, 1]) / 11
    ask = list(kinds)[int(rng.choice(len(kinds), p=weights))]
    return f"{ask} : {', '.join(map(str, values))}", kinds[ask]


def comparing(rng: Rng) -> Turn:
    """Which of two numbers is larger or smaller."""
    first, second = numbers(rng, 2)
    larger = bool(rng.integers(2))
    return f"which is {'larger' if larger else 'smaller'}, {first} or {second}", str(
        max(first, second) if larger else min(first, second)
    )


def sums(rng: Rng) -> Turn:
    """A number and a small one, added, taken away, or the next number."""
    first, second = int(rng.integers(0, 90)), int(rng.integers(0, 10))
    if rng.integers(2) and first >= second:
        return f"{first} minus {second}", str(first - second)
    return f"{first} plus {second}", str(first + second)


def tallies(rng: Rng) -> Turn:
    """How many of a fruit, name or colour there are in a list, as a number."""
    pool = (FRUITS, NAMES, COLOURS)[int(rng.integers(3))]
    wanted, *others = choose(rng, pool, 6)
    count, length = int(rng.integers(0, 6)), int(rng.integers(5, 9))
    count = min(count, length)
    words = [wanted] * count + [one(rng, tuple(others)) for _ in range(length - count)]
    listed = " ".join(words[int(index)] for index in rng.permutation(length))
    ask = ("how many times is there", "number of", "tell how many")[int(rng.integers(3))]
    word = NUMBER_WORDS[count] if rng.integers(2) else str(count)
    in_words = word == NUMBER_WORDS[count]
    return f"{ask} {wanted} in {listed}{' , in words' if in_words else ''}", word


def animals(rng: Rng) -> Turn:
    """How many feet animals have, and how often a number goes."""
    kind, each = list(LEGS.items())[int(rng.integers(len(LEGS)))]
    count = int(rng.integers(1, 1 + 24 // each))
    kinds = (
        (f"on how many feet does one {kind} walk", f"{each} feet"),
        (f"{count} {kind}s walk on how many feet", f"{count * each} feet"),
        (f"{count} times {each}", str(count * each)),
        (f"how many {kind}s walk on {count * each} feet", f"{count} {kind}s"),
    )
    return kinds[int(rng.choice(4, p=[0.1, 0.5, 0.2, 0.2]))]


def reviews(rng: Rng) -> Turn:
    """Whether a guest will come again after what was good, bad, mixed or neither."""
    first, second = choose(rng, THINGS, 2)
    kinds = ((GOOD, GOOD), (BAD, BAD), (GOOD, BAD), (BAD, GOOD), (PLAIN, PLAIN))
    index = int(rng.integers(len(kinds)))
    said = [one(rng, kind) for kind in kinds[index]]
    answer = ("yes, both pleased", "no, neither pleased", "in part", "in part", "nobody can tell")[index]
    if rng.integers(4) == 0:
        word = one(rng, GOOD + BAD + PLAIN)
        meaning = "praise" if word in GOOD else "blame" if word in BAD else "no opinion"
        return f"is {word} praise or blame", meaning
    asked = f"the {first} was {said[0]} and the {second} was {said[1]} . will {one(rng, NAMES)} come again"
    return asked, answer


def holdings(rng: Rng) -> Turn:
    """Who holds what: by the person, and by the thing."""
    count = int(rng.integers(2, 5))
    people = choose(rng, NAMES, count)
    things = choose(rng, COLOURS if rng.integers(2) else FRUITS, count)
    place = int(rng.integers(count))
    told = " . ".join(f"{person} holds the {thing} one" for person, thing in zip(people, things, strict=True))
    if rng.integers(3) == 0:
        return f"{told} . who holds the {things[place]} one", people[place]
    return f"{told} . what does {people[place]} hold", f"the {things[place]} one"


def records(rng: Rng) -> Turn:
    """Fields in several notations, JSON with other keys among them."""
    keys = choose(rng, ("tool", "cost", "colour", "who", "fruit", "number"), 3)
    pools = {"tool": THINGS, "colour": COLOURS, "who": NAMES, "fruit": FRUITS}
    values = {
        key: one(rng, pools[key]) if key in pools else int(rng.integers(1, 100)) for key in keys[: rng.integers(2, 4)]
    }
    plain = " , ".join(f"{key} {value}" for key, value in values.items())
    kinds = {
        "write as json": json.dumps(values),
        "write with =": " ; ".join(f"{key} = {value}" for key, value in values.items()),
        "write the keys": " ".join(values),
        "write the values": " ".join(map(str, values.values())),
    }
    ask = list(kinds)[int(rng.choice(4, p=[0.55, 0.15, 0.15, 0.15]))]
    return f"{ask} : {plain}", kinds[ask]


MIXTURE: tuple[tuple[Callable[[Rng], Turn], float], ...] = (
    (copying, 0.12),
    (ordering, 0.2),
    (comparing, 0.08),
    (sums, 0.05),
    (tallies, 0.15),
    (animals, 0.1),
    (reviews, 0.1),
    (holdings, 0.1),
    (records, 0.1),
)


LATE_MIXTURE: tuple[tuple[Callable[[Rng], Turn], float], ...] = (
    (hearing, 0.3),
    (holdings, 0.2),
    *((write, weight / 2) for write, weight in MIXTURE),
)


def any_turn(rng: Rng) -> Turn:
    """A question and its answer."""
    return _one_of(rng, MIXTURE)


def late_turn(rng: Rng) -> Turn:
    """A question and its answer in the late phase."""
    return _one_of(rng, LATE_MIXTURE)


def _one_of(rng: Rng, mixture: tuple[tuple[Callable[[Rng], Turn], float], ...]) -> Turn:
    write, _ = mixture[int(rng.choice(len(mixture), p=[weight for _, weight in mixture]))]
    return write(rng)
