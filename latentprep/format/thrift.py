"""Thrift's compact protocol, in which Parquet's footers and headers of pages are written."""

from __future__ import annotations

from typing import Any

_DEPTH = 8  # of structs and lists in each other


def read_struct(data: memoryview, at: int = 0) -> tuple[dict[int, Any], int]:
    """The struct at byte `at`: the number of each field -> its value, and where the struct ends.

    Values are integers, booleans, bytes, lists, and structs as dictionaries. Raises `ValueError` for what Parquet does
    not use, `IndexError` if it does not end before the data does.
    """
    return _struct(data, at, 0)


def _struct(data: memoryview, at: int, depth: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at] & 15:
        step, at = data[at] >> 4, at + 1
        if step:
            number += step
        else:
            number, at = _signed(data, at)
        if kind in (1, 2):  # the kind is the value
            fields[number] = kind == 1
        else:
            fields[number], at = _value(data, at, kind, depth + 1)
    return fields, at + 1


def _value(data: memoryview, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEPTH:
        raise ValueError("nested too deep")
    if kind in (1, 2):  # in lists
        return data[at] == 1, at + 1
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _signed(data, at)
    if kind == 8:
        length, at = _unsigned(data, at)
        if at + length > len(data):
            raise IndexError("a string ends after the last byte")
        return bytes(data[at : at + length]), at + length
    if kind == 9:
        length, of, at = data[at] >> 4, data[at] & 15, at + 1
        if length == 15:
            length, at = _unsigned(data, at)
        items = []
        for _ in range(length):  # each takes a byte or more
            item, at = _value(data, at, of, depth + 1)
            items.append(item)
        return items, at
    if kind == 12:
        return _struct(data, at, depth)
    raise ValueError(f"a field of type {kind}")


def _signed(data: memoryview, at: int) -> tuple[int, int]:
    """0, −1, 1, −2, … are stored as 0, 1, 2, 3, …"""
    value, at = _unsigned(data, at)
    return value >> 1 ^ -(value & 1), at


def _unsigned(data: memoryview, at: int) -> tuple[int, int]:
    """Seven bits in each byte, the lowest first; the last byte is below 128, and at most the tenth."""
    value = 0
    for place in range(10):
        value |= (data[at + place] & 127) << 7 * place
        if data[at + place] < 128:
            return value, at + place + 1
    raise ValueError("a number that does not end")
