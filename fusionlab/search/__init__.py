"""Searches that look at data and return a rule with its coefficients."""

from fusionlab.search.adamerging import Adamerging
from fusionlab.search.base import Found, Problem, Search, is_search, search_from_config, to_config
from fusionlab.search.coefficients import GRID, MetagptMultiplier, Validated, next_coefficients, validated_coefficient
from fusionlab.search.lorahub import Lorahub

__all__ = [
    "GRID",
    "Adamerging",
    "Found",
    "Lorahub",
    "MetagptMultiplier",
    "Problem",
    "Search",
    "Validated",
    "is_search",
    "next_coefficients",
    "search_from_config",
    "to_config",
    "validated_coefficient",
]
