"""Searches that look at data and return a rule with its coefficients."""

from fusionlab.search.adamerging import Adamerging
from fusionlab.search.base import Found, Problem, Search, is_search, rule_or_search, search_from_config, to_config
from fusionlab.search.coefficients import GRID, MetagptMultiplier, Validated, next_coefficients
from fusionlab.search.lorahub import Lorahub
from fusionlab.search.validation import ValidationProblem, check_data, complete, looks_at_data, mean_scores

__all__ = [
    "GRID",
    "Adamerging",
    "Found",
    "Lorahub",
    "MetagptMultiplier",
    "Problem",
    "Search",
    "Validated",
    "ValidationProblem",
    "check_data",
    "complete",
    "is_search",
    "looks_at_data",
    "mean_scores",
    "next_coefficients",
    "rule_or_search",
    "search_from_config",
    "to_config",
]
