"""The paper's experiments: a grid of cells, measured one by one, resumed where they stopped, shown as tables and pictures.

configs/paper/NAME.yaml -> Experiment -> cells -> measure_* -> Result -> cells.jsonl -> tables, plots
                           grid                   measures     results                  beside published numbers
"""
