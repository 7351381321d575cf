"""Checking that a dataset is intact, describing it, and sharing it.

May import `derived`, `encoding` and what these may import.
"""
