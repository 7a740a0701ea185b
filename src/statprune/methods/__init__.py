"""How one weight is pruned: statistics, criteria, patterns, compensations. Pure functions on tensors; torch alone."""
