"""One training: its configuration, the training itself, its evaluation, and predictions of what was trained."""
