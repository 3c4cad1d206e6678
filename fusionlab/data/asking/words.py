"""The small world that the embedded instruction tasks ask about."""

from __future__ import annotations

NAMES = ("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal", "ida", "jon")
COLOURS = ("red", "blue", "green", "gold", "pink", "grey")
FRUITS = ("apple", "fig", "kiwi", "lime", "pear", "plum")
TOWNS = ("rome", "oslo", "lima", "cairo", "paris", "quito", "tokyo", "delhi")
THINGS = ("soup", "room", "bread", "music", "view", "bed", "tea", "staff")
GOOD = ("lovely", "great", "warm", "fresh", "kind", "perfect")
BAD = ("awful", "poor", "cold", "stale", "rude", "dirty")
PLAIN = ("there", "small", "old", "new", "green", "round")
LEGS = {"hen": 2, "cat": 4, "ant": 6, "spider": 8, "crab": 10}
COUNT_WORDS = ("none", "once", "twice", "thrice", "often")
