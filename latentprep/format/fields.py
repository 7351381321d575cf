"""Read JSON from outside: check every value for type and range before anything uses it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from latentprep.errors import DatasetError
from latentprep.storage.places import Place

MAX_JSON_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Fields:
    """A JSON object under a name, whose getters raise `DatasetError` naming the file and the field."""

    def __init__(self, document: Any, where: str, way_out: str = "the file is damaged: restore it") -> None:
        self.where, self.way_out = where, way_out
        if not isinstance(document, dict):
            raise self.error("must be a JSON object")
        self.document: dict[str, Any] = document

    def error(self, what: str) -> DatasetError:
        return DatasetError(f"{self.where} {what}", self.way_out)

    def get(self, name: str) -> Any:
        if name not in self.document:
            raise self.error(f"has no field '{name}'")
        return self.document[name]

    def object(self, name: str) -> Fields:
        return Fields(self.get(name), f"{self.where}: {name}", self.way_out)

    def text(self, name: str, allowed: tuple[str, ...] = ()) -> str:
        value = self.get(name)
        if not isinstance(value, str) or (allowed and value not in allowed):
            raise self.error(f"has {name} = {value!r:.60}; it must be " + (" or ".join(allowed) or "a string"))
        return value

    def sha256(self, name: str) -> str:
        value = self.text(name)
        if not _SHA256.fullmatch(value):
            raise self.error(f"has {name} = {value!r:.60}; it must be 64 hexadecimal digits")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(f"has {name} = {value!r:.60}; it must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            raise self.error(f"has {name} = {value!r:.60}; it must be a number above {low:g} and up to {high:g}")
        return float(value)

    def list(self, name: str, kind: type | tuple[type, ...]) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in value):
            raise self.error(f"has a field '{name}' that is not a list of the right kind")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self.list(name, (int, float))
        if any(isinstance(v, int) and abs(v) > 2**53 for v in values) or not all(map(math.isfinite, values)):
            raise self.error(f"has a number in '{name}' that is not finite")
        return tuple(float(v) for v in values)


def read_json(path: Place) -> bytes:
    """The file's bytes, at most `MAX_JSON_BYTES` of them."""
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise DatasetError(f"{path} is larger than {MAX_JSON_BYTES} bytes; no latent dataset has such a file")
    return data


def parse_json(data: bytes, where: str, way_out: str) -> Fields:
    """The JSON object in `data`; `DatasetError` for anything else, including NaN and absurd nesting."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    def finite(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits)

    try:
        document = json.loads(data.decode("utf-8"), parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where} is not valid JSON ({error})", way_out) from error
    return Fields(document, where, way_out)


def dump_json(document: dict) -> bytes:
    """JSON as we write it: fields in order, one space of indent, a newline at the end."""
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def differences(have: Any, want: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: the dotted name and both values."""
    if isinstance(have, dict) and isinstance(want, dict):
        for key in dict.fromkeys([*have, *want]):
            yield from differences(have.get(key), want.get(key), f"{name}.{key}".lstrip("."))
    elif have != want:
        yield name, have, want
