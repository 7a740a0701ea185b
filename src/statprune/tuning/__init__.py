"""The choice of a method: candidates pruned on one half of the calibration text, scored on the other, by successive halving."""
