"""Comparisons: grids of runs, their statistics, the claims, and what networks cost."""
