"""Datasets made from the codes of other datasets: requantize, convert, subset, merge.

May import `encoding` and what it may import.
"""
