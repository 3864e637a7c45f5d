"""The published networks' sizes, counted without memory."""

from pathlib import Path

import pytest
import torch

import models
from models import ScoreModel, parameter_count, presets
from sde_lib import VPSDE

# From the authors' code or the papers' tables, in millions.
PUBLISHED = {
    "ddpm_cifar10": 35.22,
    "ddpmpp_cifar10": 61.80,
    "ddpmpp_deep_cifar10": 106.63,
    "ncsnpp_cifar10": 62.76,
    "ncsnpp_deep_cifar10": 107.59,
    "ncsnpp_vp_cifar10": 62.69,
    "adm_imagenet64": 296,
    "adm_imagenet128": 422,
    "adm_imagenet256": 554,
    "adm_imagenet512": 559,
    "dit_s_2": 33,
    "dit_b_2": 130,
    "dit_l_2": 458,
    "dit_xl_2": 675,
}


@pytest.mark.parametrize("name", presets.available())
def test_parameter_counts(name):
    with torch.device("meta"):
        count = parameter_count(presets.create(name))
    assert count == presets.PRESETS[name].parameters
    if name in PUBLISHED:
        published = PUBLISHED[name]
        assert round(count / 1e6, 0 if isinstance(published, int) else 2) == published


def test_a_preset_with_changes_is_a_network_that_runs():
    net = presets.create("ddpmpp_cifar10", channels=8, blocks=1, dropout=0.0).eval()
    x = torch.randn(1, 3, 32, 32)
    assert ScoreModel(net, VPSDE())(x, torch.tensor(0.5)).shape == x.shape


def test_the_documentation_lists_every_name_and_every_count():
    text = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    published = {
        row[0].strip("`"): int(row[2].replace(",", "")) for row in rows if row[0].strip("`") in presets.PRESETS
    }
    assert published == {name: preset.parameters for name, preset in presets.PRESETS.items()}
    named = {name for row in rows for name in row[0].replace("`", "").split(", ")}
    for known in (models.available(), models.PARAMETRIZATIONS.available(), models.CONDITIONINGS.available()):
        assert set(known) <= named
    for row in rows:  # the options that a network's row names are its own
        name = row[0].strip("`")
        if len(row) == 4 and name in models.NETWORKS.entries and name not in presets.PRESETS and "`" in row[3]:
            options = {part.split("`")[1] for part in row[3].split(", ") if part.startswith("`") and '"' not in part}
            assert options <= set(models.options(name)), (name, options)
