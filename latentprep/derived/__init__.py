"""Datasets made of datasets, from their codes alone: requantize, convert, subset, merge.

May import `encoding` and what it may.
"""
