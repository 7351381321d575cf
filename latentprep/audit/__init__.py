"""Whether a dataset is whole, what is in it, and sending it on.

May import `derived`, `encoding` and what these may.
"""
