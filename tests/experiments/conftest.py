"""A tiny world with its base model, trained once, and recipes over it."""

import shutil
from pathlib import Path

import pytest

from bfpo.config.loading import check_recipe
from bfpo.experiments import steps
from bfpo.experiments.recipe import ExperimentRecipe
from bfpo.experiments.units import make_units, run_unit

SMALL = {
    "pretraining": 200,
    "fine_tuning": 100,
    "safety_pairs": 150,
    "helpful_pairs": 150,
    "harmful_prompts": 12,
    "benign_prompts": 12,
    "lookalike_prompts": 12,
}


def make_recipe(out, **changes):
    content = {
        "out": str(out),
        "worlds": {"shared": SMALL},
        "seeds": [0, 1],
        "against": "bfpo",
        "steps": 2,
        "variants": {
            "bfpo": {"method": "bfpo"},
            "noisy": {"method": "bfpo", "dials": {"safety_noise": 0.3}, "changes": {"loss.alpha": 0.0}},
        },
    }
    return check_recipe(content | changes, ExperimentRecipe, "test")


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory) -> Path:
    """Return a folder whose `runs` hold the base model of the first seed, evaluated."""
    folder = tmp_path_factory.mktemp("trained_base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(steps, "BASE_STEPS", {"pretraining": 3, "base": 2})
        base = make_units(make_recipe("runs"))[0]
        assert not base.is_done
        run_unit(base)
    return folder


@pytest.fixture
def runs(trained_base, tmp_path, monkeypatch) -> Path:
    """Return a copy of the folder of runs. Its path is relative, so that recipes with the path in them stay equal."""
    shutil.copytree(trained_base / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "BASE_STEPS", {"pretraining": 3, "base": 2})
    return Path("runs")
