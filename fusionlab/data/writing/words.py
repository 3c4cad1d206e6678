"""The small world that the written tasks tell of: people, things, deeds, places, opinions, questions."""

from __future__ import annotations

# A word and its synonym, both usable in one place; words of one tuple mean the same.
PEOPLE: tuple[tuple[str, ...], ...] = (
    ("doctor", "physician"),
    ("teacher", "instructor"),
    ("lawyer", "attorney"),
    ("cook", "chef"),
    ("child", "kid"),
    ("farmer",),
    ("soldier",),
    ("sailor",),
    ("nurse",),
    ("king",),
)
THINGS: tuple[tuple[str, ...], ...] = (
    ("car", "automobile"),
    ("cup", "mug"),
    ("boat", "ship"),
    ("couch", "sofa"),
    ("coat", "jacket"),
    ("letter",),
    ("book",),
    ("lamp",),
    ("chair",),
    ("clock",),
)
KINDS: dict[str, str] = {
    "car": "vehicle",
    "automobile": "vehicle",
    "boat": "vehicle",
    "ship": "vehicle",
    "couch": "piece of furniture",
    "sofa": "piece of furniture",
    "chair": "piece of furniture",
    "coat": "piece of clothing",
    "jacket": "piece of clothing",
}
# Past tenses that are participles too, so that one form serves active and passive.
DEEDS: tuple[tuple[str, ...], ...] = (
    ("bought", "purchased"),
    ("found", "discovered"),
    ("repaired", "fixed"),
    ("washed", "cleaned"),
    ("watched", "observed"),
    ("sold",),
    ("carried",),
    ("painted",),
    ("lost",),
    ("built",),
)
STEMS: dict[str, str] = {
    "bought": "buy",
    "purchased": "purchase",
    "found": "find",
    "discovered": "discover",
    "repaired": "repair",
    "fixed": "fix",
    "washed": "wash",
    "cleaned": "clean",
    "watched": "watch",
    "observed": "observe",
    "sold": "sell",
    "carried": "carry",
    "painted": "paint",
    "lost": "lose",
    "built": "build",
}
PLACES: tuple[str, ...] = (
    "in the garden",
    "near the river",
    "at the market",
    "behind the school",
    "in the kitchen",
    "on the hill",
    "by the lake",
    "under the bridge",
)
TIMES: tuple[str, ...] = ("yesterday", "last night", "this morning", "on monday")
# Each with its opposite.
QUALITIES: tuple[tuple[str, str], ...] = (
    ("old", "young"),
    ("rich", "poor"),
    ("happy", "sad"),
    ("tall", "short"),
    ("strong", "weak"),
)
SUBJECTS: tuple[str, ...] = ("film", "plot", "story", "acting", "script", "ending", "music", "cast")
PRAISE: tuple[str, ...] = ("good", "great", "wonderful", "brilliant", "charming", "clever", "funny", "superb")
BLAME: tuple[str, ...] = ("bad", "awful", "terrible", "boring", "dull", "stupid", "lame", "dreadful")
DEGREES: tuple[str, ...] = ("really", "very", "quite", "rather")
ACTIONS: tuple[str, ...] = ("buy", "sell", "paint", "clean", "repair", "build", "move", "draw")
TARGETS: tuple[str, ...] = (
    *("a car", "a house", "a bicycle", "a boat", "a piano", "a garden", "a clock", "a bridge", "a bed", "a roof"),
)
SKILLS: tuple[str, ...] = tuple(f"{action} {target}" for action in ACTIONS for target in TARGETS)
# Ways to ask one thing each: the ways of a row mean the same.
QUESTIONS: tuple[tuple[str, ...], ...] = (
    ("how can i {} ?", "what is the best way to {} ?", "what should i do to {} ?"),
    ("why do people {} ?", "what is the reason to {} ?", "what makes people {} ?"),
    ("where can i {} ?", "what is a good place to {} ?", "which place is right to {} ?"),
    ("when should i {} ?", "what is the right time to {} ?", "at what time do people {} ?"),
    ("how much does it cost to {} ?", "what is the price to {} ?", "is it expensive to {} ?"),
)
