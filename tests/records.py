"""The accuracies that a record under benchmarks/records holds, as the documents write them."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent.parent / "benchmarks" / "records"
NAMES = ("run", "bits", "stem", "images")  # rows that have these in common differ by their seed


def accuracies(name: str) -> set[str]:
    """Each number as ``87.9``, in percent, and mean and deviation over seeds as ``87.9`` and as ``87.9 ± 0.4``."""
    path = RECORDS / name
    if path.suffix == ".md":
        return set(path.read_text().replace("%", " ").replace("|", " ").split())
    document = list(csv.DictReader(path.open())) if path.suffix == ".csv" else json.loads(path.read_text())
    return set(_written(document))


def _written(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _written(value)
        if len(node) > 1 and all(isinstance(value, dict) for value in node.values()):
            yield from _written(list(node.values()))  # runs by seed
    elif isinstance(node, list):
        for value in node:
            yield from _written(value)
        rows = [row for row in node if isinstance(row, dict)]
        groups: dict[tuple, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            for key, value in row.items():
                if (number := _number(value)) is not None:
                    groups[tuple(str(row.get(name)) for name in NAMES)][key].append(number)
        curves = [value[-1] for value in node if isinstance(value, list) and value]
        for values in [node, curves, *(of for group in groups.values() for of in group.values())]:
            if 1 < len(values) <= 10 and all(isinstance(value, float) for value in values):
                mean = f"{_percent(statistics.mean(values)):.1f}"
                yield from (mean, f"{mean} ± {_percent(statistics.stdev(values), statistics.mean(values)):.1f}")
    elif (number := _number(node)) is not None:
        yield f"{_percent(number):.1f}"


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _percent(value: float, like: float | None = None) -> float:
    return 100 * value if abs(value if like is None else like) <= 1 else value
