"""The settings of the paper's experiments and its published numbers: `statprune.paper` to Python, so that they are installed."""
