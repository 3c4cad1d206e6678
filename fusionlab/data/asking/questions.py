"""What the embedded instruction tasks ask: one function a task, for a label or with the answer."""

from __future__ import annotations

import json
from typing import TypeAlias

import numpy as np

from fusionlab.data.asking.words import BAD, COLOURS, FRUITS, GOOD, LEGS, NAMES, PLAIN, THINGS, TOWNS

Rng: TypeAlias = np.random.Generator


def choose(rng: Rng, words: tuple[str, ...], count: int) -> list[str]:
    """So many different words, in random order."""
    return [words[int(index)] for index in rng.permutation(len(words))[:count]]


def sorting(rng: Rng) -> tuple[str, str]:
    """Three different numbers below 100, and the same from small to large."""
    numbers = [int(number) for number in rng.permutation(100)[:3]]
    return f"sort {' '.join(map(str, numbers))}", " ".join(map(str, sorted(numbers)))


def form(rng: Rng) -> tuple[str, str]:
    """A person's name, age and town, and the same as JSON."""
    name, town, age = choose(rng, NAMES, 1)[0], choose(rng, TOWNS, 1)[0], int(rng.integers(10, 100))
    return f"json {name} {age} {town}", json.dumps({"name": name, "age": age, "town": town})


def counting(rng: Rng, label: int) -> str:
    """A list of six fruits in which the first one that is named comes ``label`` times."""
    wanted, *others = choose(rng, FRUITS, len(FRUITS))
    words = [wanted] * label + [others[int(rng.integers(len(others)))] for _ in range(6 - label)]
    return f"count {wanted} : {' '.join(words[int(index)] for index in rng.permutation(6))}"


def legs(rng: Rng, label: int) -> str:
    """Animals of one kind with ``label`` + 1 times two legs in all."""
    total = 2 * (label + 1)
    kinds = [(kind, total // each) for kind, each in LEGS.items() if total % each == 0]
    kind, count = kinds[int(rng.integers(len(kinds)))]
    first, second = choose(rng, NAMES, 2)
    return f"legs {count} {kind} of {first} and {second} in {choose(rng, TOWNS, 1)[0]}"


def mood(rng: Rng, label: int) -> str:
    """Two things that someone says something of: both good, both bad, one of each, or neither."""
    first, second = choose(rng, THINGS, 2)
    kinds = {0: (GOOD, GOOD), 1: (BAD, BAD), 2: (GOOD, BAD), 3: (PLAIN, PLAIN)}[label]
    if rng.integers(2):
        kinds = kinds[::-1]
    said = [choose(rng, kind, 1)[0] for kind in kinds]
    return f"mood {first} {said[0]} , {second} {said[1]} , says {choose(rng, NAMES, 1)[0]}"


def lookup(rng: Rng, label: int) -> str:
    """A table of three people's colours, and one of the people, whose colour is number ``label``."""
    people = choose(rng, NAMES, 3)
    others = choose(rng, tuple(colour for colour in COLOURS if colour != COLOURS[label]), 2)
    colours = [COLOURS[label], *others]
    rows = [f"{people[int(index)]} {colours[int(index)]}" for index in rng.permutation(3)]
    return f"table {' | '.join(rows)} ? {people[0]}"
