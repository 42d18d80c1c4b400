"""The networks that come with the repository say what they were trained on, as their model cards do."""

import re

import pytest

from srlib import data
from srlib.run import checkpoints, pretrained


@pytest.mark.parametrize("name", ["mni152", "hippocampus"])
def test_a_network_s_file_and_its_card_agree_with_the_data(name):
    try:
        data.open(name)
    except FileNotFoundError:
        pytest.skip(f"no {name} here")
    file = pretrained.file(name)
    found, card = checkpoints.load_trained(file), file.with_suffix(".md").read_text()
    assert checkpoints.data_changes(found) == []
    assert f"data fingerprint {found.fingerprint}" in card
    assert re.search(rf"Trained on\*\* {len(found.split.train)} cases of fold 0", card)
    assert re.search(rf"Held-out\*\* {len(found.split.test)} cases", card)
    assert f"torch {found.versions['torch']}" in card
