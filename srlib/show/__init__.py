"""Figures: charts of tables, slices of volumes, and explorers."""
