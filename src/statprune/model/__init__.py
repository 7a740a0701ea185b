"""Read a model, walk it, write to it: its graph, its linear layers, the statistics of their inputs. Knows no recipe."""
