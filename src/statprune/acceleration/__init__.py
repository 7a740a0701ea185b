"""2:4 weights packed for the sparse kernels of a GPU, where a measurement on it says that they are faster."""
