"""Whether a sweep's rules can be chosen on its data by its module, before anything is fitted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from fusionlab.errors import InputError, name_list
from fusionlab.rules import AnyRule, is_open
from fusionlab.search import Search, check_data, check_module
from fusionlab.search.workbench import Workbench


def check_rules(
    rules: Mapping[str, AnyRule | Search],
    protocols: Collection[str],
    bench: Workbench,
    methods: Iterable[str],
    subsets: Sequence[Sequence[str]],
) -> None:
    """Raise if a rule has nothing to look at, or nothing to choose by, or looks where a protocol does not let it.

    Raises:
        InputError: naming the rules.
    """
    strict = "strict" in protocols  # else open rules are chosen on test
    looking = {name: rule for name, rule in rules.items() if strict or not is_open(rule)}
    check_data(looking, bench.data, methods)
    on_test = [name for name, rule in rules.items() if isinstance(rule, Search) and rule.split == "test"]
    if on_test and strict:
        raise InputError(
            f"rules {name_list(on_test)} look at inputs of the test splits, as published results do; give "
            f"protocols [published] alone, or let them look elsewhere"
        )
    check_module(rules, bench.module, bench.data, subsets)
