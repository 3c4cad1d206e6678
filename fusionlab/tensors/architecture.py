"""The architecture that a checkpoint names: which of its names may be one tensor, read without running its code."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from typing import Any

from fusionlab.errors import InputError
from fusionlab.tensors.classes import COMPUTED, ModelClass, auto_class, find_class, library_file

_TIES = "_tied_weights_keys"
_FLAG = "tie_word_embeddings"
_CONV1D = "Conv1D"  # transformers' linear layer that stores its weight (in, out)
_CONV1D_NAMES = ("c_attn", "c_fc", "c_proj", "q_attn")  # which it has in transformers' models
_PLAIN = re.compile(r"^[\w.]+\.(weight|bias)$")


@dataclass(frozen=True)
class Tie:
    """What a name may be one tensor with.

    Args:
        source: the other name, which stands for both.
        allowed: whether the configuration, as its class resolves it, ties them; asked only where it matters.
    """

    source: str
    allowed: Callable[[], bool]


@dataclass(frozen=True)
class Architecture:
    """The model class that ``config.json`` names.

    Args:
        folder: where the checkpoint is; its own code is read there.
        config: the content of ``config.json``.
    """

    folder: Path
    config: Mapping[str, Any]

    @cached_property
    def source(self) -> ModelClass | None:
        """The class in its source, the checkpoint's own code first; None where it is not known."""
        name = (self.config.get("architectures") or [""])[0]
        for entry in _entries(self.config.get("auto_map")):
            file, _, class_name = entry.rpartition("--")[2].rpartition(".")
            path = self.folder / f"{file}.py"
            if class_name == name and path.is_file():
                return find_class(path, class_name)
        file_of_library = library_file(name, str(self.config.get("model_type", "")))
        return None if file_of_library is None else find_class(file_of_library, name)

    @property
    def is_custom(self) -> bool:
        """Whether the class is the checkpoint's own code, which is not run."""
        return self.source is not None and self.source.path.parent == self.folder

    @cached_property
    def model(self) -> Any:
        """The model without storage (on torch's meta device), by transformers' own class; None where there is none.

        Raises:
            InputError: transformers refuses the configuration.
        """
        if self.source is None or self.is_custom:
            return None
        import torch
        import transformers

        model_class = getattr(transformers, self.source.node.name, None)
        if model_class is None:
            return None
        config, own = self.resolved, model_class.config_class
        if not isinstance(config, own):
            config = getattr(config, own.base_config_key or own.model_type, None)
        if config is None:  # the class and the configuration are of different models
            return None
        try:
            with torch.device("meta"):
                return model_class(config)
        except Exception as error:  # on numbers that fit no model its constructor raises whatever they lead it to
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{str(self.folder)!r}: transformers makes no model of it: {reason}") from error

    @cached_property
    def resolved(self) -> Any:
        """The configuration as its class resolves it, defaults and renamed fields included.

        Raises:
            InputError: transformers refuses it.
        """
        return self._resolve(self.config)

    @cached_property
    def _ties_resolved(self) -> Any:
        """The configuration with nothing but its model types and what it says of ties."""
        return self._resolve(_only_ties(self.config))

    def untied_config(self) -> dict[str, Any]:
        """``config.json`` saying that nothing is tied, for readers that go by it alone.

        Left as it is where its class then reads something else out of it too, as T5's does.
        """
        changed = _without_ties(self.config)
        if self.source is None or self.is_custom:
            return changed
        before, after = self._ties_resolved, self._resolve(_only_ties(changed))
        is_all = _without_ties(before.to_dict()) == _without_ties(after.to_dict()) and not getattr(after, _FLAG, False)
        return changed if is_all else dict(self.config)

    def _resolve(self, config: Mapping[str, Any]) -> Any:
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        assert self.source is not None
        own, folder = config.get("model_type"), self.source.path.parent.name
        kind = next((kind for kind in (own, folder, folder.replace("_", "-")) if kind in CONFIG_MAPPING), None)
        if kind is None:
            raise InputError(f"{str(self.folder)!r}: transformers has no model type {own!r}")
        try:
            return CONFIG_MAPPING[kind].from_dict(dict(config))
        except (StrictDataclassError, ValueError, TypeError, AttributeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{str(self.folder)!r}: transformers refuses its config.json: {reason}") from error

    def may_be_tied(self, names: Collection[str]) -> dict[str, Tie]:
        """Name -> what the class may tie it to; empty where the class is not known.

        Args:
            names: the names that there are, in the base and the inputs, for patterns.
        """
        if self.source is None:
            return {}
        declared = list(self._declared(self.source, (), "", ()))
        if any(keys is COMPUTED for _, keys, _ in declared):
            return self._by_the_model()
        found: dict[str, Tie] = {}
        for prefix, keys, where in declared:
            inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            pairs = self._from_list(keys, inside) if isinstance(keys, (list, tuple)) else keys
            for target, source in _expanded(pairs, inside).items():
                if {target, source} & set(inside):
                    found[prefix + target] = Tie(prefix + source, partial(self._flag, where))
        return found

    def is_transposed(self, module: str) -> bool | None:
        """Whether a linear layer stores its weight ``(in, out)``; None where that cannot be told."""
        leaf = module.rpartition(".")[2]
        if self.source is None:
            return None if leaf in _CONV1D_NAMES else False
        makers = self.source.makers(leaf)
        if _CONV1D not in makers and (makers or not self.source.mentions_name(_CONV1D)):
            return False
        if makers == {_CONV1D}:
            return True
        parts = dict(self.model.named_modules()) if self.model is not None else {}
        return type(parts[module]).__name__ == _CONV1D if module in parts else None

    def _declared(
        self, of: ModelClass, where: tuple[str, ...] | None, prefix: str, above: tuple[str, ...]
    ) -> Iterator[tuple[str, Any, tuple[str, ...] | None]]:
        """``(prefix, what the class ties, its configuration)`` of a class and of the models that it is made of."""
        keys = COMPUTED if of.mentions(_TIES) else of.literal(_TIES)
        if keys:
            yield prefix, keys, where
        above = (*above, of.node.name)
        for child in of.children():
            inner = None if where is None or child.config is None else (*where, *child.config)
            part = of.of(child.class_name)
            if child.class_name.startswith("AutoModel"):
                part = auto_class(child.class_name, self._model_type(inner))
            if part is not None and part.node.name not in above:
                yield from self._declared(part, inner, f"{prefix}{child.name}.", above)

    def _model_type(self, where: tuple[str, ...] | None) -> str:
        """The ``model_type`` of a part of the configuration."""
        config: Any = self.config
        for key in where or ():
            config = config.get(key) if isinstance(config, Mapping) else None
        if isinstance(config, Mapping) and "model_type" in config:
            return str(config["model_type"])
        return "" if self.is_custom else str(getattr(self._part(where), "model_type", ""))

    def _part(self, where: tuple[str, ...] | None) -> Any:
        config = self._ties_resolved
        for key in where or ():
            config = getattr(config, key, config)
        return config

    def _by_the_model(self) -> dict[str, Tie]:
        """Where the class computes what it ties, the model without storage says it, configuration included."""
        pairs = {} if self.model is None else self.model.get_expanded_tied_weights_keys(all_submodels=True)
        return {target: Tie(source, lambda: True) for target, source in pairs.items()}

    def _from_list(self, patterns: Collection[str], names: Collection[str]) -> dict[str, str]:
        """Transformers 4's form, as custom code has it: names that are tied to the input embeddings."""
        assert self.source is not None
        embedding = _input_embedding(self.source)
        if embedding is None:
            return {}
        source = f"{embedding}.weight"
        matching = (name for name in names if any(re.search(pattern, name) for pattern in patterns))
        return {name: source for name in matching if name != source}

    def _flag(self, where: tuple[str, ...] | None) -> bool:
        """Whether the part of the configuration at ``where`` ties."""
        if self.is_custom:
            return self._custom_flag()
        return bool(getattr(self._part(where), _FLAG, False))

    def _custom_flag(self) -> bool:
        """As written; else the default of the checkpoint's own class; else that of transformers 4, which ties."""
        if _FLAG in self.config:
            return bool(self.config[_FLAG])
        file, _, name = (
            str((self.config.get("auto_map") or {}).get("AutoConfig", "")).rpartition("--")[2].rpartition(".")
        )
        path = self.folder / f"{file}.py"
        own = find_class(path, name) if path.is_file() else None
        default = None if own is None else own.argument(_FLAG)
        return True if default is None or default is COMPUTED else bool(default)


def _entries(auto_map: Any) -> Iterator[str]:
    """The classes in ``auto_map``; a tokenizer's entry is a list."""
    for value in auto_map.values() if isinstance(auto_map, Mapping) else ():
        yield from (each for each in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(each, str))


def _only_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key == "model_type" or "tie" in str(key).split("_")}
    parts = {key: _only_ties(value) for key, value in config.items() if isinstance(value, dict)}
    return kept | {key: part for key, part in parts.items() if {"model_type", _FLAG} & part.keys()}


def _without_ties(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {key: _without_ties(value) for key, value in config.items() if isinstance(value, dict) and _FLAG in value}
    return {**config, **parts, _FLAG: False}


def _expanded(pairs: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Patterns and modules in ``pairs`` as parameter names, as transformers expands them."""
    if all(_PLAIN.match(name) for name in (*pairs, *pairs.values())):
        return dict(pairs)
    found: dict[str, str] = {}
    for target, source in pairs.items():
        sources = sorted(name for name in names if re.search(f"^{source}", name))
        targets = sorted(name for name in names if re.search(f"^{target}", name))
        if sources:
            for name, first in zip(targets, cycle(sources)):
                found[name] = found.get(first, first)
    return found


def _input_embedding(of: ModelClass) -> str | None:
    """The module that ``get_input_embeddings`` returns: by its own text, or by that of the inner model."""
    if (path := of.returned("get_input_embeddings")) is not None:
        return path
    children = {child.name: child for child in of.children()}
    inner = of.literal("base_model_prefix", "")
    for name in (inner, *children) if inner in children else children:
        part = of.of(children[name].class_name)
        found = _input_embedding(part) if part is not None and part.node.name != of.node.name else None
        if found is not None:
            return f"{name}.{found}"
    return next((child.name for child in children.values() if child.class_name == "Embedding"), None)
