"""How task vectors lie to one another and what they are weighted by, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusionlab.contracts import Row
from fusionlab.layout import FUSION
from fusionlab.reporting.page import Cell, Note, Table
from fusionlab.reporting.words import model_name


def geometry(rows: Sequence[Row], records: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Tables of coefficients, norms and cosines, and of what rounding lost."""
    parts: list[Any] = []
    by_rule = {model_name(row): row["scaling_coefficients"] for row in rows if row["scaling_coefficients"]}
    numbers = {name: of for name, of in by_rule.items() if all(isinstance(value, float) for value in of.values())}
    if numbers:
        tasks = list(dict.fromkeys(task for of in numbers.values() for task in of))
        body = [[name, *(f"{of[task]:.4f}" if task in of else "–" for task in tasks)] for name, of in numbers.items()]
        parts.append(Table("Scaling coefficients of the task vectors", ["rule", *tasks], body))
    if others := [name for name in by_rule if name not in numbers]:
        parts.append(Note("Coefficients by parameter", [f"{', '.join(others)}: see {FUSION} in the model's folder."]))
    for norms in [record["norms"] for record in records.values() if record.get("norms")][:1]:
        parts.append(_norms(norms))
    for matrix in [found for record in records.values() if (found := cosine_matrix(record.get("cosines") or {}))][:1]:
        parts.append(cosine_table(matrix, "Cosine similarity of the task vectors"))
    rounded = {model_name(row): row["rounding"] for row in rows if row.get("rounding")}
    if rounded:
        body = [[name, *(f"{of[what]:.1%}" for what in ("kept", "changed", "lost"))] for name, of in rounded.items()]
        caption = "Share of the changed weights whose update rounding keeps, changes and loses"
        parts.append(Table(caption, ["model", "kept", "changed", "lost"], body))
    return parts


def _norms(norms: Mapping[str, float]) -> Table:
    return Table(
        "Norm of each task vector", ["of the", *norms], [["norm", *(f"{value:.4g}" for value in norms.values())]]
    )


def cosine_matrix(cosines: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """All pairs, from one half of them; empty for fewer than two tasks."""
    names = list(dict.fromkeys([*cosines, *(other for row in cosines.values() for other in row)]))
    if len(names) < 2:
        return {}
    return {
        a: {b: 1.0 if a == b else cosines.get(a, {}).get(b, cosines.get(b, {}).get(a, 0.0)) for b in names}
        for a in names
    }


def cosine_table(matrix: Mapping[str, Mapping[str, float]], caption: str) -> Table:
    """A map of −1 to 1 with its numbers."""
    body: list[list[Cell | str]] = [
        [a, *(Cell(f"{value:.2f}".replace("-", "−"), shade=None if a == b else value) for b, value in row.items())]
        for a, row in matrix.items()
    ]
    return Table(f"{caption} (−1 to 1; 0 is orthogonal)", ["task", *matrix], body)
