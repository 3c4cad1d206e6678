"""What fusing, scoring, searching and the commands ask of networks, modules, data and fine-tuned weights.

A module and a data module of any package fit where they have the members of :class:`Module` and :class:`Data`, beside
what Lightning asks. :class:`ModuleDefaults` and :class:`DataDefaults` give what most need not say. Names of parameters
are those in the memory of ``backbone.model`` without adapters; tensors of batches are on the module's device where a
module is given them, and on the CPU where data give them; in the dtype in which data give them, but where Lightning
gives the module a batch.
"""

from fusionlab.contracts.checks import (
    as_data,
    as_module,
    as_tokenizing,
    check_task_names,
    has_heads,
    is_backbone,
    is_source,
    is_tokenizing,
)
from fusionlab.contracts.choosing import Choosing, primary_metric
from fusionlab.contracts.defaults import DataDefaults, ModuleDefaults, Network
from fusionlab.contracts.protocols import (
    Application,
    Backbone,
    Batch,
    Data,
    Headed,
    LinearOutputs,
    Module,
    Row,
    Source,
    Tokenizing,
)

__all__ = [
    "Application",
    "Backbone",
    "Batch",
    "Choosing",
    "Data",
    "DataDefaults",
    "Headed",
    "LinearOutputs",
    "Module",
    "ModuleDefaults",
    "Network",
    "Row",
    "Source",
    "Tokenizing",
    "as_data",
    "as_module",
    "as_tokenizing",
    "check_task_names",
    "has_heads",
    "is_backbone",
    "is_source",
    "is_tokenizing",
    "primary_metric",
]
