"""What a person looks at: the results file, its tables and plots, and the report over runs and sweeps."""

from fusionlab.reporting.page import markdown_table
from fusionlab.reporting.png import save_figure
from fusionlab.reporting.reference import check_reference, normalize, share, single_task_values
from fusionlab.reporting.results import SCHEMA, limits, line_name, markdown, print_table, table, write_results
from fusionlab.reporting.scores import plot_scores

__all__ = [
    "SCHEMA",
    "check_reference",
    "limits",
    "line_name",
    "markdown",
    "markdown_table",
    "normalize",
    "plot_scores",
    "print_table",
    "save_figure",
    "share",
    "single_task_values",
    "table",
    "write_results",
]
