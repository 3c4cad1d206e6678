"""Searches that look at data and return a rule with its coefficients, or with statistics of models run over data."""

from fusionlab.search.adamerging import Adamerging
from fusionlab.search.asked import check_module
from fusionlab.search.base import (
    Found,
    Problem,
    Running,
    Search,
    is_search,
    rule_or_search,
    search_from_config,
    to_config,
)
from fusionlab.search.coefficients import START, MetagptMultiplier, Validated
from fusionlab.search.fisher import Fisher
from fusionlab.search.looks import MEAN_LOOKS, Exhaustive, Looks, ToTheTop, best, look, looks_for
from fusionlab.search.lorahub import Lorahub
from fusionlab.search.masks import ValidatedMasks, completing, knows_the_task
from fusionlab.search.mlps import check_mlps
from fusionlab.search.regmean import Regmean
from fusionlab.search.regmean_plus_plus import RegmeanPlusPlus
from fusionlab.search.training import TrainingRuns
from fusionlab.search.validation import (
    ValidationProblem,
    check_data,
    complete,
    looks_at_data,
    scored_at_once,
    validation_rows,
)
from fusionlab.search.wemoe import Wemoe

__all__ = [
    "MEAN_LOOKS",
    "START",
    "Adamerging",
    "Exhaustive",
    "Fisher",
    "Found",
    "Looks",
    "Lorahub",
    "MetagptMultiplier",
    "Problem",
    "Regmean",
    "RegmeanPlusPlus",
    "Running",
    "Search",
    "ToTheTop",
    "TrainingRuns",
    "Validated",
    "ValidatedMasks",
    "ValidationProblem",
    "Wemoe",
    "best",
    "check_data",
    "check_mlps",
    "check_module",
    "complete",
    "completing",
    "is_search",
    "knows_the_task",
    "look",
    "looks_at_data",
    "looks_for",
    "rule_or_search",
    "scored_at_once",
    "search_from_config",
    "to_config",
    "validation_rows",
]
