"""Fusion rules, one a file. The name of a rule in a config is the snake case of its class."""

from fusionlab.rules.average import Average
from fusionlab.rules.base import LinearRule, Rule, Statistics, TaskVectors
from fusionlab.rules.config import from_config, rule_name
from fusionlab.rules.metagpt import Metagpt
from fusionlab.rules.task_arithmetic import TaskArithmetic

__all__ = [
    "Average",
    "LinearRule",
    "Metagpt",
    "Rule",
    "Statistics",
    "TaskArithmetic",
    "TaskVectors",
    "from_config",
    "rule_name",
]
