"""The command line `latentprep`, and the terminal that both command lines share.

A command parses, calls one function of the library and renders what it returns. May import everything below.
"""

from latentprep.cli.commands import app, main

__all__ = ["app", "main"]
