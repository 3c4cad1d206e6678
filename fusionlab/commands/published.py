"""What others may read of a folder of weights: its files, with places of this machine left out of what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError, name_list
from fusionlab.files import accessed, is_there
from fusionlab.foreign import OwnRecord, PeftConfig, read_json
from fusionlab.foreign.cards import card_head
from fusionlab.layout import ADAPTER_CONFIG, CARD, FUSION, OWN
from fusionlab.tensors.hub import embedded, is_hub_id

_PEFT_BASE = "base_model_name_or_path"
# what makers of models call a place; what stands there is a path, or a hub's id
_PLACES = frozenset((
    "_name_or_path", "name_or_path", _PEFT_BASE, "tokenizer_name_or_path", "tokenizer_file", "vocab_file",
    "merges_file", "special_tokens_map_file", "chat_template_file",
))  # fmt: skip
_OWN_PLACES = _PLACES | {"base", "name"}  # in what this package writes
_VOCABULARIES = re.compile(r"tokenizer\.json|vocab\..*|merges\.txt|added_tokens\.json|.*\.(model|tiktoken)")
_CACHED = re.compile(r".*/models--([\w.]+(?:-[\w.]+)*)--([\w.-]+)/snapshots/([0-9a-f]+)/?")
_SCHEMED = re.compile(r"([\w.-]+:)?(.*)", re.DOTALL)
_BELOW = r"(?![\w.-])(?:/[^\s'\"`,;:()\[\]{}<>]*)?"  # after the name of a folder: no longer name, and what is in it


@dataclass(frozen=True)
class Sent:
    """A file as others get it, where that is not the file itself.

    Args:
        content: of it.
        instead: what it says here, and what it says to others.
    """

    content: str
    instead: Mapping[str, str]


def base_of(folder: Path) -> str:
    """What the folder calls its base; empty where it names none.

    Raises:
        InputError: its records cannot be read.
    """
    if is_there(folder / ADAPTER_CONFIG):
        return read_json(folder / ADAPTER_CONFIG, PeftConfig).get(_PEFT_BASE) or ""
    for name in (FUSION, OWN):
        if is_there(folder / name):
            base = read_json(folder / name, OwnRecord).get("base") or ""
            return str(base.get("name") or "") if isinstance(base, dict) else str(base)
    return ""


def is_path(name: str) -> bool:
    """Whether a model's ``name`` is a place on this machine, and none that others know it by.

    Example:
        >>> [is_path(name) for name in ("owner/model@main", "tiny-clip", "ViT-B-32:openai", "/data/model", "../a")]
        [False, False, False, True, True]
    """
    place = _schemed(name)[1]
    if not place or embedded(place) is not None or is_hub_id(place):
        return False
    return "/" in place or Path(place).expanduser().exists()


def bare(place: str) -> str:
    """A path as others are told it: the hub's id where it lies in the hub's cache, else its last name.

    Example:
        >>> bare("/home/me/models/base/"), bare("ViT-B-32:../mine/weights.pt")
        ('base', 'ViT-B-32:weights.pt')
        >>> bare("/hf/hub/models--owner--name/snapshots/0a1b")
        'owner/name@0a1b'
    """
    scheme, path = _schemed(place)
    return cached_id(place) or scheme + (Path(path).name or "folder")


def cached_id(place: str) -> str | None:
    """The id and commit of what lies in the hub's cache; None for what lies elsewhere."""
    found = _CACHED.fullmatch(place)
    return f"{found[1]}/{found[2]}@{found[3]}" if found else None


@dataclass(frozen=True)
class Publisher:
    """Makes what is sent of a folder's files.

    Args:
        folder: of weights.
        base: the base's id on the hub, where the folder names one of this machine; None where it is not told.
    """

    folder: Path
    base: str | None = None

    def sent(self, files: Iterable[str]) -> dict[str, Sent]:
        """The files that are sent otherwise than they are, by name.

        Raises:
            InputError: a file that is sent as it is names a folder of this machine, or ``base`` is another than the
                folder's own.
        """
        if self.base is not None:
            self._check_base(self.base)
        found, bad = {}, []
        for name in files:
            if (other := self._card() if name == CARD else self._json(name)) is not None:
                found[name] = other
            elif place := self._named_in(name):
                bad.append(f"{name} names {place!r}")
        if bad:
            raise InputError(
                f"{str(self.folder)!r} is not sent, since others would read places of this machine there: "
                f"{name_list(bad)}. Mend that, or take the files away"
            )
        return found

    def _check_base(self, base: str) -> None:
        if not ("/" in base and is_hub_id(base)):
            raise InputError(f"--base {base!r}: expected the base's id on the hub, OWNER/NAME or OWNER/NAME@REVISION")
        own = base_of(self.folder).partition("@")[0]
        if own in self._bases and embedded(own) is None and own != base.partition("@")[0]:
            raise InputError(f"--base {base!r}: {str(self.folder)!r} names {own!r} as its base; leave --base out")

    @cached_property
    def _bases(self) -> list[str]:
        """The models on the hub that the card names."""
        named = card_head(self.folder / CARD).get("base_model") or []
        return [named] if isinstance(named, str) else [str(each) for each in named]

    def _card(self) -> Sent | None:
        """The card with the base's id at its head; None where it has it already."""
        from huggingface_hub import ModelCard

        name = (self.base or "").partition("@")[0]
        if not name or name in self._bases:
            return None
        card = ModelCard.load(self.folder / CARD)
        others = [each for each in self._bases if embedded(each) is None]
        card.data.base_model = [name, *others] if others else name
        text = str(card)
        return None if self._here.search(text) else Sent(text, {"no base": name})

    def _json(self, name: str) -> Sent | None:
        """A file of JSON without places of this machine; None for what names none, vocabularies and other files."""
        if not name.endswith(".json") or _VOCABULARIES.fullmatch(Path(name).name):
            return None
        with accessed(self.folder / name):
            data = (self.folder / name).read_bytes()
        try:
            content = json.loads(data)
        except ValueError:  # what it names is looked for as in any text
            return None
        told = self._told(content, _OWN_PLACES if name in (FUSION, OWN) else _PLACES)
        if isinstance(told, dict) and name in (ADAPTER_CONFIG, FUSION, OWN):
            told = self._with_base(told)
        if told == content:
            return None
        return Sent(json.dumps(told, indent=2) + "\n", dict(_changes(content, told)))

    def _told(self, value: Any, places: frozenset[str], key: str = "") -> Any:
        """A value of JSON without places of this machine."""
        if isinstance(value, dict):
            return {self._elsewhere(name): self._told(each, places, name) for name, each in value.items()}
        if isinstance(value, list):
            return [self._told(each, places) for each in value]
        if not isinstance(value, str):
            return value
        return bare(value) if key in places and is_path(value) else self._elsewhere(value)

    def _with_base(self, record: dict[str, Any]) -> dict[str, Any]:
        """What a record says, with the base that was given, and its revision where PEFT looks for it."""
        if self.base is not None and isinstance(own := record.get("base"), str | dict):
            record = record | {"base": own | {"name": self.base} if isinstance(own, dict) else self.base}
        if _PEFT_BASE not in record:
            return record
        base, _, revision = (self.base or record[_PEFT_BASE] or "").partition("@")
        return record | ({_PEFT_BASE: base} if base else {}) | ({"revision": revision} if revision else {})

    def _elsewhere(self, text: str) -> str:
        """A text with bare names for places below this machine's folders."""
        if text.startswith("/") and "\n" not in text and self._here.match(text):
            return bare(text)
        return self._here.sub(lambda found: bare(found[0]), text)

    def _named_in(self, name: str) -> str | None:
        """A place of this machine in a file's text, or in the header of its weights."""
        path, here = self.folder / name, self._here
        with accessed(path), open(path, "rb") as file:
            is_weights = path.suffix == ".safetensors"
            data = file.read(int.from_bytes(file.read(8), "little")) if is_weights else file.read()
        if _VOCABULARIES.fullmatch(path.name):  # of a home such as /root words may begin
            here = _pattern(each for each in self._folders() if len(each.parts) > 2)
        found = here.search(data.decode("utf-8", errors="replace"))
        return found[0] if found else None

    @cached_property
    def _here(self) -> re.Pattern[str]:
        return _pattern(self._folders())

    def _folders(self) -> Iterator[Path]:
        """The folders whose names are nobody else's: the home, where this runs, the weights' own and those above."""
        if len(Path.home().parts) > 1:
            yield Path.home()
        for own in (Path.cwd(), self.folder.absolute(), self.folder.resolve()):
            yield from (each for each in (own, *own.parents) if len(each.parts) > 2)


def _pattern(folders: Iterable[Path]) -> re.Pattern[str]:
    names = sorted({str(each) for each in folders}, key=len, reverse=True)
    if not names:
        return re.compile("(?!)")
    return re.compile(f"(?<![\\w.-])(?:{'|'.join(map(re.escape, names))}){_BELOW}")


def _schemed(name: str) -> tuple[str, str]:
    """A model's name in two: open_clip's or timm's scheme, and what comes after."""
    found = _SCHEMED.fullmatch(name)
    assert found is not None
    return found[1] or "", found[2]


def _changes(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    """The texts of two values of JSON that differ, in the same places."""
    if isinstance(before, dict):
        for (old, was), (new, now) in zip(before.items(), after.items(), strict=False):
            yield from _changes(old, new)
            yield from _changes(was, now)
    elif isinstance(before, list):
        for was, now in zip(before, after, strict=True):
            yield from _changes(was, now)
    elif before != after:
        yield str(before), str(after)
