"""Lightning modules: one that knows tasks, adapters and optimisation, and a small one per kind of model."""

from fusionlab.modules.base import FusionModule
from fusionlab.modules.causal import CausalModule
from fusionlab.modules.clip import ClipModule
from fusionlab.modules.t5 import T5Module
from fusionlab.modules.vit import ViTModule

__all__ = ["CausalModule", "ClipModule", "FusionModule", "T5Module", "ViTModule"]
