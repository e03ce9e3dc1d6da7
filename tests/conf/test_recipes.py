"""The recipes of the family's members against the published numbers, tests/fixtures/recipes/published.csv."""

import csv
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import OmegaConf

from ivl_lightning.config.lora import trained_parts
from ivl_lightning.config.schema import RecipeConfig, RunConfig
from ivl_lightning.data.templates import template_of
from ivl_lightning.launch import compose as launch_compose
from ivl_lightning.launch.overrides import complete
from ivl_lightning.stages.base import Stage

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "conf/recipe"
SIZES_2_5 = ("1b", "2b", "4b", "8b", "26b", "38b", "78b")
SIZES_2_0 = ("1b", "2b", "4b", "8b", "26b", "40b", "76b")
AGAIN = (*(f"internvl2_5_{size}" for size in SIZES_2_5), *(f"internvl2_{size}" for size in SIZES_2_0))
STAGES = {
    **dict.fromkeys(AGAIN, ("mlp_warmup", "instruction_tuning")),
    **{
        f"internvl2_5_{size}": ("mlp_warmup", "vit_incremental", "instruction_tuning", "mixed_preference")
        for size in SIZES_2_5
    },
    "internvl2_1b": ("vit_incremental", "instruction_tuning"),
    "internvl2_2b": ("vit_incremental", "instruction_tuning"),
    "internvl2_8b": ("mlp_warmup", "instruction_tuning", "mixed_preference"),
    "internvl1_5_2b": ("vit_incremental", "instruction_tuning"),
    "internvl1_5_4b": ("mlp_warmup", "instruction_tuning"),
    "internvl1_5_26b": ("vit_incremental", "instruction_tuning"),
    "internvl1_5_40b": ("mlp_warmup", "instruction_tuning"),
    "internvl1_1": ("vit_incremental", "instruction_tuning"),
    "internvl1_2": ("vit_incremental", "instruction_tuning"),
    "internvl1_2_plus": ("vit_incremental", "instruction_tuning"),
    **{
        f"{kind}/{name}": ("instruction_tuning",)
        for kind, names in (
            ("finetune", (*AGAIN, "internvl1_2")),
            ("lora", AGAIN),
            ("domain", ("drivelm", "bdd", "medical", "remote_sensing")),
        )
        for name in names
    },
}
"""What each member must have."""

DONORS = {
    **dict.fromkeys((f"internvl2_5_{size}" for size in ("1b", "2b", "4b")), "internvl2_5_8b"),
    **dict.fromkeys((f"internvl2_5_{size}" for size in ("38b", "78b")), "internvl2_5_26b"),
}


class Row(NamedTuple):
    """A line of the table."""

    recipe: str
    stage: str
    setting: str
    value: str
    source: str

    def fits(self, recipe: str, stage: str) -> bool:
        """Whether it speaks of this stage of this recipe."""
        return any(fnmatchcase(recipe, name) for name in self.recipe.split()) and (
            self.stage == "*" or stage in self.stage.split()
        )


with (ROOT / "tests/fixtures/recipes/published.csv").open(encoding="utf-8", newline="") as lines:
    TABLE = [Row(**line) for line in csv.DictReader(lines)]


@pytest.fixture(scope="module", autouse=True)
def hydra_configs():
    """One composition of a recipe serves all its stages, which are read from it; a third of the time less."""

    @cache
    def compose_recipe(overrides: tuple[str, ...]) -> Any:
        return compose("train", overrides=list(overrides))

    def compose_once(config_name: str, overrides: list[str]) -> Any:
        if any(override.startswith("++") for override in overrides):
            return compose(config_name, overrides=overrides)
        return compose_recipe(tuple(override for override in overrides if not override.startswith("stage=")))

    with (
        initialize_config_module("ivl_lightning.conf", version_base="1.3"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(launch_compose, "compose", compose_once)
        yield


def arguments(recipe: str) -> list[str]:
    return [f"recipe={recipe}", "data.meta=META"]


@cache
def recipe_of(name: str) -> RecipeConfig:
    composed = launch_compose.compose("train", overrides=[*arguments(name), "run_dir='RUN'"]).recipe
    return RecipeConfig(**OmegaConf.to_container(composed, resolve=False))


@cache
def stage_config(recipe: str, stage: str) -> RunConfig:
    return launch_compose.compose_stage(stage, arguments(recipe), run_dir="RUN")


def published(recipe: str, stage: str) -> dict[str, Any]:
    """Setting -> published value; rows of all recipes give way to others."""
    rows = sorted((row for row in TABLE if row.fits(recipe, stage)), key=lambda row: row.recipe != "*")
    return {row.setting: yaml.safe_load(row.value) for row in rows}


def value_of(config: RunConfig, setting: str) -> Any:
    """The value that holds in the end, with what null stands for."""
    if setting == "stage.trainable":
        default = get_class(config.stage._target_).default_trainable
        return list(trained_parts(config.stage.trainable, config.lora, default))
    if setting == "recipe.gpus":
        return config.recipe.gpus.get(config.stage.name)
    if setting == "model.template":
        return template_of(config.model.template, None)
    if setting == "model.ps_version":
        return config.model.ps_version or "v2"
    if setting.startswith("preference.parts."):
        part, key = setting.split(".")[2:]
        return config.preference.parts[part][key]
    return attrgetter(setting)(config)


def settings_read(config: RunConfig) -> Iterator[str]:
    """Settings that decide training and that the stage reads: those that must be published or chosen."""
    yield from ("optim.lr", "optim.weight_decay", "stage.trainable", "stage.drop_path_rate")
    yield "optim.warmup_ratio" if config.optim.warmup_steps is None else "optim.warmup_steps"
    yield "trainer.max_epochs" if config.trainer.max_steps is None else "trainer.max_steps"
    yield from ("data.packs_per_step", "data.max_tokens", "data.max_pack_tiles", "data.max_tiles")
    if config.data.max_sample_tokens is not None:
        yield "data.max_sample_tokens"
    if config.data.max_tiles > 1:
        yield "data.use_thumbnail"
    if config.lora.parts:
        yield "lora.rank"
    if config.stage.rows == "pairs":
        yield "data.batch_pairs"
        return
    yield "loss.reduction"
    if config.data.batch_samples is not None:
        yield "data.batch_samples"


def faults_of(recipe: str, stage: str) -> Iterator[str]:
    config, rows = stage_config(recipe, stage), published(recipe, stage)
    chosen, read = config.recipe.chosen.get(stage, []), list(settings_read(config))
    for setting, value in rows.items():
        found = value_of(config, setting)
        if setting == "data.use_thumbnail" and setting not in read:
            continue
        same = sorted(found) == sorted(value) if setting.endswith((".trainable", ".parts")) else found == value
        if not same:
            yield f"{stage}: {setting}={found}, published is {value}"
    for setting in read:
        if (setting in rows) == (setting in chosen):
            yield f"{stage}: {setting}={value_of(config, setting)} must be published or in recipe.chosen, not both"
    yield from (f"{stage}: {setting} is chosen, but not read" for setting in chosen if setting not in read)
    yield from (f"{stage}: {setting} is chosen twice" for setting, times in Counter(chosen).items() if times > 1)
    source = config.recipe.sources.get(stage, config.recipe.source)
    if not source.startswith(("script: ", "write-up: ", "chosen: ")):
        yield f"{stage}: source {source!r} says no kind"
    if source.startswith("script: ") != ("recipe.gpus" in rows) or (stage in config.recipe.gpus) != (
        "recipe.gpus" in rows
    ):
        yield f"{stage}: recipe.gpus={config.recipe.gpus} belongs to numbers of scripts"
    if config.recipe.name != recipe or not issubclass(get_class(config.stage._target_), Stage):
        yield f"{stage}: recipe.name={config.recipe.name}, stage {config.stage._target_}"


@pytest.mark.parametrize("recipe", STAGES)
def test_every_number_is_published_or_chosen(recipe):
    """Each row of the table is what a stage gets in the end. Each setting of `settings_read` stands in the table or in
    `recipe.chosen`, never in both, and nothing is chosen that the stage does not read. A stage whose numbers come from
    a script names its accelerators.

    Rows whose recipe is `*` cover, for all recipes, AdamW's betas and eps, cosine to 0, decay of all parameters,
    clipping, thumbnail, tile size, unshuffling, truncation, `repeat_time` below 1, and the mixture of MPO.
    """
    assert set(recipe_of(recipe).stages) == set(STAGES[recipe])
    assert not [fault for stage in STAGES[recipe] for fault in faults_of(recipe, stage)]


def test_every_member_has_its_recipes():
    """The files below conf/recipe are those of the list above, besides those whose numbers are the project's own."""
    files = {str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")}
    own = {name for name in files if name == "none" or name.startswith(("base/", "miniature"))}
    assert files - own == set(STAGES)
    assert not [name for name in AGAIN if not (ROOT / f"conf/model/{name}.yaml").is_file()]


def test_the_table_speaks_of_what_there_is():
    """Every row fits a stage of a recipe, and no two rows of named recipes give one setting two values."""
    places = [(recipe, stage) for recipe, stages in STAGES.items() for stage in stages]
    assert not [row for row in TABLE if not any(row.fits(*place) for place in places)]
    named = Counter((place, row.setting) for row in TABLE if row.recipe != "*" for place in places if row.fits(*place))
    assert not [key for key, times in named.items() if times > 1]


@pytest.mark.parametrize(("recipe", "donor"), DONORS.items())
def test_towers_come_from_a_member_that_trains_them(recipe, donor):
    """The donor has the same tower and runs stage 1.5; who gets it runs that stage only on request."""
    assert recipe_of(recipe).donor == donor
    assert recipe_of(recipe).on_request == ["vit_incremental"]
    assert not recipe_of(donor).on_request
    assert recipe_of(donor).donor is None
    towers = [stage_config(name, "vit_incremental").model.vision for name in (recipe, donor)]
    assert towers[0] == towers[1]
    numbers = [stage_config(name, "vit_incremental") for name in (recipe, donor)]
    assert not [
        setting
        for setting in settings_read(numbers[0])
        if value_of(numbers[0], setting) != value_of(numbers[1], setting)
    ]


def test_other_members_need_no_donor():
    assert not [name for name in STAGES if name not in DONORS and (recipe_of(name).donor or recipe_of(name).on_request)]


def test_what_a_name_brings():
    """A model alone brings the recipe of that name; a domain goes with any model; a run folder takes a name's blank."""
    recipes = [path.stem for path in RECIPES.iterdir()]
    assert complete(["model=internvl2_1b"], recipes)[0] == "recipe=internvl2_1b"
    assert complete(["model=internvl2_1b", "recipe=domain/bdd"], recipes) == ["model=internvl2_1b", "recipe=domain/bdd"]
    domain = launch_compose.compose_stage(
        "instruction_tuning", ["model=internvl2_4b", *arguments("domain/bdd")], run_dir="R"
    )
    assert (domain.model.name, domain.recipe.model) == ("internvl2_4b", None)
    composed = launch_compose.compose("train", overrides=[*arguments("finetune/internvl2_5_8b"), "++seed=1"])
    assert composed.run_dir == "runs/finetune/internvl2_5_8b"


def test_the_pages_of_the_recipes_are_up_to_date():
    """docs/recipes/*.md say what the recipes compose to."""
    spec = importlib.util.spec_from_file_location("generate_recipes", ROOT / "docs/generate_recipes.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    told = generator.pages(
        lambda recipe: {
            stage: stage_config(recipe, stage) for stage in launch_compose.stage_names(None, STAGES[recipe])
        }
    )
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/recipes").glob("*.md")}
    assert there == dict(told), "run `python docs/generate_recipes.py`"


def test_the_meta_of_1_2():
    """docs/recipes.md shows a meta.json of the nine datasets: names and lengths are those that data=internvl1_2 expects
    of fine-tuning; pretraining expects none.
    """
    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    meta = json.loads(block)
    assert {name: entry["length"] for name, entry in meta.items()} == stage_config(
        "internvl1_2", "instruction_tuning"
    ).data.expected_rows
    assert stage_config("internvl1_2", "vit_incremental").data.expected_rows is None
    assert len(meta) == 9
    for entry in meta.values():
        assert set(entry) == {"root", "annotation", "data_augment", "repeat_time", "length"}
        assert (entry["data_augment"], entry["repeat_time"]) == (False, 1)
