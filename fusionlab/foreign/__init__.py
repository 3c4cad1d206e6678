"""Files that others wrote: read with a schema of the fields that are used, and refused by name where one is wrong."""

from fusionlab.foreign.reading import as_json, check_keys, checked, parse_yaml, read_json, read_json_list, read_yaml
from fusionlab.foreign.schemas import (
    ImageProcessor,
    InnerModule,
    KeptStats,
    MergekitConfig,
    ModelConfig,
    OwnRecord,
    PeftConfig,
    Processor,
    Results,
    RoutedRecord,
    RunConfig,
    Schema,
    TokenizerFile,
    WeightIndex,
)

__all__ = [
    "ImageProcessor",
    "InnerModule",
    "KeptStats",
    "MergekitConfig",
    "ModelConfig",
    "OwnRecord",
    "PeftConfig",
    "Processor",
    "Results",
    "RoutedRecord",
    "RunConfig",
    "Schema",
    "TokenizerFile",
    "WeightIndex",
    "as_json",
    "check_keys",
    "checked",
    "parse_yaml",
    "read_json",
    "read_json_list",
    "read_yaml",
]
