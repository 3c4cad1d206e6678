"""What a person looks at: the results file, its tables and plots, and the report over runs and sweeps."""

from fusionlab.reporting.results import (
    SCHEMA,
    check_reference,
    limits,
    line_name,
    markdown,
    markdown_table,
    normalize,
    plot_scores,
    print_table,
    save_figure,
    share,
    single_task_values,
    table,
    write_results,
)

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
