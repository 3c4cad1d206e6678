"""Models that are parts of one another, by names, shapes and the source of their classes: towers, inner models.

A class says which other models it is made of (``self.vision_model = CLIPVisionModel(...)``) and what it ignores when it
loads; files say the rest: the names of a part are those of the whole after a prefix, which older files have and newer
ones have not, or the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from fusionlab.tensors.architecture import Architecture
from fusionlab.tensors.classes import ModelClass

Shapes = Mapping[str, tuple[int, ...]]
Ignored = Callable[[str], bool]
_IGNORED = "_keys_to_ignore_on_load_unexpected"
# buffers that transformers ignores in old files where its class has them
_BUFFERS = {"inv_freq": r"rotary_emb\.inv_freq$", "position_ids": r"position_ids$"}
_DEEP = 4


@dataclass(frozen=True)
class Relation:
    """How the names of one model stand to those of the base.

    Args:
        names: name in the base -> name in the other model, for those that it has.
        is_part: whether one is a part of the other, so that what the other lacks is the base's own, and what it has
            beyond the base is not used.
        lacking: what the base has in the place of the part and the other model has not.
    """

    names: Mapping[str, str]
    is_part: bool
    lacking: tuple[str, ...] = ()


def relation(base: Shapes, of_base: Architecture, other: Shapes, of_other: Architecture) -> Relation | None:
    """How ``other`` stands to ``base``; None where its names mean what they say, or nothing tells what they mean.

    Where one class is made of the other, its place says the prefix; else the only prefix under which most names have
    the base's shapes. A model of another class is a part where all that one of the two has is found in the other.

    Args:
        base: shape by name.
        of_base: what the base is.
        other: shape by name of the other model.
        of_other: what that one is.
    """
    if base.keys() == other.keys() or of_base.source is None or of_other.source is None:
        return None
    first, second = of_base.source, of_other.source
    are_two = first.node.name != second.node.name
    declared = []
    if are_two:
        declared = [("", f"{place}.") for place in places(first, second.node.name)]
        declared += [(f"{place}.", "") for place in places(second, first.node.name)]
    found = _best(base, other, declared)
    ties = {*of_base.may_be_tied(base), *of_other.may_be_tied(other)}
    if found is not None:
        names = _renamed(base, other, *found)
        return Relation(names, True, _lacking(base, found[1], {*names, *ties}))
    pairs = [("", prefix) for prefix in _prefixes(base)] + [(prefix, "") for prefix in _prefixes(other)]
    found = _best(base, other, pairs)
    plain = _score(base, other, "", "")
    if found is None or _score(base, other, *found) <= plain:
        found = ("", "")
    names = _renamed(base, other, *found)
    rest = _beyond(base, set(names), ties, ignored(of_base))
    more = _beyond(other, set(names.values()), ties, ignored(of_other))
    is_part = are_two and bool(names) and rest != more
    if not is_part and all(name == own for name, own in names.items()):
        return None
    place = next((added for _, added in declared if any(name.startswith(added) for name in names)), None)
    return Relation(names, is_part, () if place is None else _lacking(base, place, {*names, *ties}))


def _lacking(base: Collection[str], place: str, taken: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in base if name.startswith(place) and name not in taken)


def _beyond(all_names: Collection[str], taken: Collection[str], ties: Collection[str], loose: Ignored) -> bool:
    """Whether there is more than what is taken, tied or ignored in loading."""
    return any(name not in taken and name not in ties and not loose(name) for name in all_names)


def places(outer: ModelClass, class_name: str, depth: int = _DEEP) -> list[str]:
    """Where in ``outer`` a model of class ``class_name`` is, by the paths of its attributes."""
    found = []
    for child in outer.children() if depth else ():
        if child.class_name == class_name:
            found.append(child.name)
        part = outer.of(child.class_name) if "Model" in child.class_name else None
        if part is not None and part.node.name not in (class_name, outer.node.name):
            found += [f"{child.name}.{place}" for place in places(part, class_name, depth - 1)]
    return list(dict.fromkeys(found))


def adapted_names(base: Shapes, of_base: Architecture, changed: Shapes, class_name: str) -> dict[str, str]:
    """Name that an adapter of a part, or of a whole, changes -> its name in the base; as it is where no class tells it.

    Args:
        base: shape by name.
        of_base: what the base is.
        changed: shape of the weights that the adapter changes, but for the order of its sides.
        class_name: of the model that the adapter was made for; empty where it does not say it.
    """
    first = of_base.source
    if first is None:
        return {name: name for name in changed}
    second = first.of(class_name) if class_name else None
    turned = {name: tuple(sorted(shape)) for name, shape in base.items()}
    own = {name: tuple(sorted(shape)) for name, shape in changed.items()}
    pairs = []
    if second is not None:
        pairs = [("", f"{place}.") for place in places(first, class_name)]
        pairs += [(f"{place}.", "") for place in places(second, first.node.name)]
    found = _best(turned, own, pairs)
    if found is None:
        pairs = [("", prefix) for prefix in _prefixes(base)] + [(prefix, "") for prefix in _prefixes(changed)]
        found = _best(turned, own, [pair for pair in pairs if _score(turned, own, *pair) == len(own)])
    renamed = {} if found is None else _renamed(base, changed, *found)
    in_base = {name: new for new, name in renamed.items()}
    return {name: in_base.get(name, name) for name in changed}


def ignored(architecture: Architecture) -> Ignored:
    """What tells a name that ``from_pretrained`` of the class ignores where the model has no such parameter.

    Its patterns are held against whole parts of names: ``attn.bias`` is not in ``c_attn.bias``.
    """

    @cache
    def pattern() -> re.Pattern[str] | None:  # read when the first name is asked for
        source = architecture.source
        if source is None:
            return None
        patterns = [pattern for word, pattern in _BUFFERS.items() if source.mentions_name(word)]
        for each in dict.fromkeys(_classes(source)):
            declared = each.literal(_IGNORED)
            patterns += [str(pattern) for pattern in declared] if isinstance(declared, (list, tuple, set)) else []
        either = "|".join(f"(?:{pattern.removeprefix('^')})" for pattern in patterns)
        return re.compile(rf"(?:^|\.)(?:{either})") if patterns else None

    return lambda name: (found := pattern()) is not None and found.search(name) is not None


def _best(base: Shapes, other: Shapes, pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The prefix to take away and to add under which most names have the base's shapes; None for none, or several."""
    scores = {pair: _score(base, other, *pair) for pair in dict.fromkeys(pairs)}
    most = max(scores.values(), default=0)
    best = [pair for pair, score in scores.items() if score == most]
    return best[0] if most and len(best) == 1 else None


def _score(base: Shapes, other: Shapes, removed: str, added: str) -> int:
    return sum(base[name] == other[own] for name, own in _renamed(base, other, removed, added).items())


def _renamed(base: Collection[str], other: Collection[str], removed: str, added: str) -> dict[str, str]:
    """Name in the base -> name in the other model."""
    pairs = ((added + name.removeprefix(removed), name) for name in other if name.startswith(removed))
    return {new: name for new, name in pairs if new in base}


def _prefixes(shapes: Collection[str]) -> list[str]:
    """The names of inner models, as far as names tell them: what stands before a dot, but for numbered layers."""
    found: dict[str, None] = {}
    for name in shapes:
        prefix = ""
        for part in name.split(".")[:-1][:_DEEP]:
            if part.isdigit():
                break
            prefix += f"{part}."
            found[prefix] = None
    return list(found)


def _classes(of: ModelClass, above: tuple[str, ...] = ()) -> Iterator[ModelClass]:
    """The class and the models that it is made of."""
    yield of
    for child in of.children():
        part = of.of(child.class_name)
        if part is not None and part.node.name not in (*above, of.node.name) and len(above) < _DEEP:
            yield from _classes(part, (*above, of.node.name))
