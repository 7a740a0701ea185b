"""The settings of the paper's experiments and its published numbers; installed as the package `statprune.paper`."""
