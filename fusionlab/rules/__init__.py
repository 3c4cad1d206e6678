"""Fusion rules, one a file. The name of a rule in a config is the snake case of its class."""

from fusionlab.blocks.task_vectors import Statistics, TaskVectors
from fusionlab.rules.average import Average
from fusionlab.rules.base import LinearRule, Rule, coefficients_by_norms
from fusionlab.rules.breadcrumbs import Breadcrumbs
from fusionlab.rules.config import from_config, plain_rule, rule_name, to_config
from fusionlab.rules.consensus import Consensus
from fusionlab.rules.dare import Dare
from fusionlab.rules.della import Della
from fusionlab.rules.disjoint_mean import DisjointMean
from fusionlab.rules.emr import Emr
from fusionlab.rules.iso_c import IsoC
from fusionlab.rules.iso_cts import IsoCts
from fusionlab.rules.karcher import Karcher
from fusionlab.rules.knots import Knots
from fusionlab.rules.lines import Lines
from fusionlab.rules.localize_and_stitch import LocalizeAndStitch
from fusionlab.rules.metagpt import Metagpt
from fusionlab.rules.model_stock import ModelStock
from fusionlab.rules.nuslerp import Nuslerp
from fusionlab.rules.open import coefficient_of, is_open, with_argument, with_coefficient
from fusionlab.rules.passthrough import Passthrough
from fusionlab.rules.sce import Sce
from fusionlab.rules.slerp import Slerp
from fusionlab.rules.tall import Tall, with_usual_threshold
from fusionlab.rules.task_arithmetic import TaskArithmetic
from fusionlab.rules.task_known import AnyRule, StreamedRule, TaskKnownRule
from fusionlab.rules.ties import Ties
from fusionlab.rules.trim import Trim
from fusionlab.rules.tsv_m import TsvM
from fusionlab.rules.wudi import Wudi

__all__ = [
    "AnyRule",
    "Average",
    "Breadcrumbs",
    "Consensus",
    "Dare",
    "Della",
    "DisjointMean",
    "Emr",
    "IsoC",
    "IsoCts",
    "Karcher",
    "Knots",
    "LinearRule",
    "Lines",
    "LocalizeAndStitch",
    "Metagpt",
    "ModelStock",
    "Nuslerp",
    "Passthrough",
    "Rule",
    "Sce",
    "Slerp",
    "Statistics",
    "StreamedRule",
    "Tall",
    "TaskArithmetic",
    "TaskKnownRule",
    "TaskVectors",
    "Ties",
    "Trim",
    "TsvM",
    "Wudi",
    "coefficient_of",
    "coefficients_by_norms",
    "from_config",
    "is_open",
    "plain_rule",
    "rule_name",
    "to_config",
    "with_argument",
    "with_coefficient",
    "with_usual_threshold",
]
