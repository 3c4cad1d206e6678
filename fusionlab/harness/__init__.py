"""Tasks of lm-eval, scored by its own code on the weights that act in a module."""

from fusionlab.harness.bridge import Scored
from fusionlab.harness.tasks import HarnessTasks

__all__ = ["HarnessTasks", "Scored"]
