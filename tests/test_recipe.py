"""`srlib.files.RECIPE` names what is computed: it is raised by hand, and this test says when."""

import torch

from srlib.files import RECIPE
from srlib.run import runs, train

# Losses of a tiny training in float64 on the virtual cohort, by version. When they move by more than rounding, runs
# that are done are results of another recipe: raise RECIPE, and write its losses here.
LOSSES = {1: (1.8255718946, 1.8266855478, 1.7997288704)}


def test_results_move_only_with_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    settings = {"steps": 3, "patch_size": (40, 40, 40), "precision": "64-true", "batch_size": 2}
    history = train.train(runs.config_for("smoke", "mni152", **settings)).history
    losses = torch.tensor(history["loss"].to_numpy())
    expected = torch.tensor(LOSSES[RECIPE], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)  # samples are float32
