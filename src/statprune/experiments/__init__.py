"""Measure many things, go on where it stopped, show it: the paper's experiments, comparisons, what the walk costs.

configs/paper/NAME.yaml -> Experiment -> cells -> run    -> Result  -> cells.jsonl -> tables, plots
                           definition             runtime   results                   beside published numbers
                                                  zero_shot
"""
