"""`srlib.files.RECIPE` names what is computed: it is raised by hand, and these tests say when.

Numbers by version, of a tiny training and of its samples on the virtual cohort. When they move by more than rounding,
runs that are done are results of another recipe: raise RECIPE, and write its numbers here.
"""

import pytest
import torch

from srlib import data
from srlib.files import RECIPE
from srlib.run import runs, train

PATCH = (40, 40, 40)
LOSSES = {2: (1.8268714759, 1.8237700822, 1.7610910858)}
SAMPLES = {2: (0.79377, 1.22231, 0.51666)}  # mean, standard deviation, part that is labelled


@pytest.fixture
def in_float64():
    """Fabric casts a float64 network's output to this; AdamW makes much of rounding where gradients are tiny."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_losses_move_only_with_the_recipe(tmp_path, monkeypatch, in_float64):
    monkeypatch.setenv("SRLIB_RESULTS", str(tmp_path))
    # crops alone, since processors differ in the last bit of what is interpolated in float32
    settings = {"steps": 3, "patch_size": PATCH, "batch_size": 2, "augment": False}
    config = runs.config_for("smoke", "mni152", precision="64-true", **settings)
    losses = torch.tensor(train.train(config).history["loss"].to_numpy())
    # The third one differs by 3e-9 between processors with AVX2 and with AVX-512.
    torch.testing.assert_close(losses, torch.tensor(LOSSES[RECIPE]), rtol=1e-6, atol=0)


def test_samples_move_only_with_the_recipe():
    dataset = data.open("mni152")
    samples = data.TrainingSamples(dataset, dataset.split().train, PATCH, 2, 8, seed=0)
    images = torch.stack([sample["image"] for sample in samples])
    labelled = torch.stack([sample["label"] > 0 for sample in samples]).float().mean()
    found = torch.stack([images.mean(), images.std(), labelled])
    torch.testing.assert_close(found, torch.tensor(SAMPLES[RECIPE]), rtol=1e-4, atol=0)
