"""The notebooks: their execution, their pages, and the comparison with what the repository holds."""
