"""Weights on disk: a model that is larger than memory is read from its files and pruned into those of its output."""
