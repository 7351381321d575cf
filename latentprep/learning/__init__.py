"""Training codecs: `train_codec` makes a `learned` codec of a source's own images.

It may import everything of latentprep but the command line.
"""
