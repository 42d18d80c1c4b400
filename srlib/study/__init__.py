"""Comparisons: grids of runs, their statistics, receptive fields, the paper's tables and its claims."""
