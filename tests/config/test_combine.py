"""The `combine:` section: its fields are those of the combiners, and a wrong one is refused by name."""

from dataclasses import fields

import pytest
from pydantic import TypeAdapter

from bfpo.config.combine import COMBINE_SECTIONS, CombineSection
from bfpo.config.loading import check_recipe, dump_recipe, parse_yaml
from bfpo.errors import RecipeError
from bfpo.losses.combine import COMBINERS, make_combiner
from bfpo.online.recipe import OnlineRecipe

MINIMAL = {
    "model": {"path": "org/model"},
    "prompts": [{"name": "file", "path": "prompts.jsonl"}],
    "reward": "reward:org/reward",
    "cost": "beaver-cost:org/cost",
}


def check(**changes):
    return check_recipe(MINIMAL | changes, OnlineRecipe, "r.yaml")


def test_every_combiner_has_a_section_of_its_own():
    assert list(COMBINE_SECTIONS) == list(COMBINERS)
    for name, section in COMBINE_SECTIONS.items():
        assert section.model_fields["name"].default == name
        assert type(TypeAdapter(CombineSection).validate_python({"name": name})) is section


@pytest.mark.parametrize("name", COMBINERS)
def test_fields_and_defaults_are_those_of_the_combiner(name):
    section = {key: field.default for key, field in COMBINE_SECTIONS[name].model_fields.items() if key != "name"}
    defaults = {field.name: field.default for field in fields(COMBINERS[name])}
    # The running quantile is state only; the file of a multiplier is read into `start`.
    defaults.pop("tail_start", None)
    assert section == defaults
    assert make_combiner(check(combine={"name": name}).combine.model_dump(exclude_none=True)) == COMBINERS[name]()


@pytest.mark.parametrize(
    "combine", [{}, {"name": "tail", "over": "prompts"}, {"name": "my.module:Mine", "weight": 2}]
)
def test_a_recipe_reads_back_as_it_was(combine):
    recipe = check(combine=combine)
    assert check_recipe(parse_yaml(dump_recipe(recipe), "dumped"), OnlineRecipe, "dumped") == recipe


@pytest.mark.parametrize(
    ("combine", "message"),
    [
        ({"name": "lagrangien"}, r"combine: name is 'lagrangien'; did you mean 'lagrangian'\?"),
        ("lagrangian", r"combine: expected a section such as"),
        ({"start": 9}, r"combine: start is 9; expected a number from min 0\.01 to max 5"),
        ({"most": 5}, r"combine\.most: unknown key of 'lagrangian'"),
        ({"multiplier": "dual.json", "rate": 0.1}, "a file with a fixed λ; leave out"),
        ({"name": "multiplicative", "floor": 0.1}, r"combine\.floor: .* less than or equal to 0"),
        ({"name": "tail", "share": 0}, r"combine\.share: .* greater than 0"),
    ],
)
def test_wrong_sections_are_refused(combine, message):
    with pytest.raises(RecipeError, match=message):
        check(combine=combine)
