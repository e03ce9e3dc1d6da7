"""Every config composes, is checked by the schema, and instantiates on the meta device."""

import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from transformers import InternVLForConditionalGeneration

from ivl_lightning.config import schema
from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.constants import STAGES
from ivl_lightning.launch.compose import compose_stage, stage_names
from ivl_lightning.launch.finished import deciding_settings
from ivl_lightning.launch.overrides import check_keys, complete, flatten, literal, parse
from ivl_lightning.launch.run_stage import preference_options
from ivl_lightning.models.build import build_config
from ivl_lightning.stages.base import Stage

CONF = Path(__file__).parents[2] / "conf"
PARAMETERS = {
    "internvl2_5_1b": 938_193_024,
    "internvl2_5_2b": 2_205_754_368,
    "internvl2_5_4b": 3_712_637_952,
    "internvl2_5_8b": 8_075_365_376,
    "internvl2_5_26b": 25_514_186_112,
    "internvl2_5_38b": 38_388_164_992,
    "internvl2_5_78b": 78_408_318_336,
}
# Of members whose parameters were published rounded, in billions, with the digits given there.
ROUNDED = {"internvl1_1": (19, 0), "internvl1_2": (40.1, 1), "internvl1_5_26b": (25.5, 1)}
GROUP_SCHEMAS = {
    "data/default": schema.DataConfig,
    "loss/next_token": schema.LossConfig,
    "preference/mpo": schema.PreferenceConfig,
    "lora/none": schema.LoraSettings,
    "optim/adamw": schema.OptimConfig,
    "trainer/default": schema.TrainerConfig,
    "strategy/single": schema.StrategyConfig,
    "launcher/none": schema.LauncherConfig,
    "model/custom": schema.ModelConfig,
}


@pytest.fixture(scope="module", autouse=True)
def hydra_configs():
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        yield


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@cache
def recipe_of(arguments: tuple[str, ...]) -> DictConfig:
    """Composed once for all stages of a run, as the chain does."""
    return compose("train", overrides=list(arguments)).recipe


def stage_config(name: str, *arguments: str) -> schema.RunConfig:
    return compose_stage(name, arguments, run_dir="RUN", recipe=recipe_of(arguments))


@pytest.mark.parametrize("name", [name for name in names("recipe") if not name.startswith("internvl")])
def test_every_stage_of_recipes_of_our_own(name):
    """Those of the family's members stand in test_recipes.py."""
    arguments = [f"recipe={name}", "data.meta=META"]
    stages = list(compose("train", overrides=arguments).recipe.stages)
    assert stages or name == "none"
    for stage in stages:
        config = stage_config(stage, *arguments)
        assert config.recipe.name == name
        assert issubclass(get_class(config.stage._target_), Stage)
        assert instantiate({"_target_": config.loss._target_}).reduction == config.loss.reduction


@pytest.mark.parametrize(
    ("group", "choice"),
    [
        (group, name)
        for group in ("optim", "loss", "preference", "lora", "trainer", "strategy", "logger", "callbacks", "experiment")
        for name in names(group)
    ],
)
def test_every_choice_of_the_small_groups(group, choice):
    stage_config(
        "instruction_tuning", f"{group}={choice}", *(["trainer.devices=2"] if choice in ("ddp", "fsdp", "hsdp") else [])
    )


@pytest.mark.parametrize("name", names("model"))
def test_every_model_on_meta(name):
    """Built without memory; published sizes have the published number of parameters, exactly or rounded as told."""
    config = load(schema.ModelConfig, OmegaConf.to_container(compose("train", overrides=[f"model={name}"]).model))
    if name == "custom":
        return
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(build_config(config))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS.get(name, count)
    billions, digits = ROUNDED.get(name, (None, 0))
    assert billions in (None, round(count / 1e9, digits))


def test_all_published_sizes_have_a_model_and_a_recipe():
    assert set(PARAMETERS) <= set(names("model")) & set(names("recipe"))


@pytest.mark.parametrize(("name", "kind"), GROUP_SCHEMAS.items())
def test_yaml_and_schema_agree(name, kind):
    """The YAML lists every setting, with the schema's default, so that Hydra knows them all and defaults stand once."""
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert set(values) == {field.name for field in fields(kind)}
    required = {name: value for name, value in (("meta", "M"), ("name", values.get("name"))) if name in values}
    if kind is schema.PreferenceConfig:
        required["parts"] = values["parts"]  # no default: the heads are classes
    if kind is schema.DataConfig:
        values["cache_dir"] = None  # in a run it lies in the run folder
    assert load(kind, {**values, **required}) == kind(**required)


def test_published_numbers_of_a_recipe():
    """8B, stage 2: lr 4e-5, 5500 steps of 512 packs, weight decay 0.05, drop path 0.1; stage 1: 2e-4, warm-up 100."""
    tuning = stage_config("instruction_tuning", "recipe=internvl2_5_8b", "data.meta=M")
    assert (tuning.optim.lr, tuning.trainer.max_steps, tuning.data.packs_per_step) == (4e-5, 5500, 512)
    assert (tuning.optim.weight_decay, tuning.stage.drop_path_rate, tuning.optim.warmup_ratio) == (0.05, 0.1, 0.03)
    warmup = stage_config("mlp_warmup", "recipe=internvl2_5_8b", "data.meta=M")
    assert (warmup.optim.lr, warmup.optim.warmup_steps, warmup.stage.drop_path_rate) == (2e-4, 100, 0.0)
    incremental = stage_config("vit_incremental", "recipe=internvl2_5_26b", "data.meta=M")
    assert (incremental.data.packs_per_step, incremental.stage.drop_path_rate) == (1024, 0.4)


@pytest.mark.parametrize("size", ["1b", "2b", "4b", "8b", "26b", "38b", "78b"])
def test_published_numbers_of_mpo(size):
    """shell/internvl2.5_mpo: lr 1e-6, 256 pairs (512 for 38B and 78B), 8,192 tokens, weight decay 0.05, one epoch,
    warm-up 3 %, drop path 0.1 (0.4 from 26B on), nothing frozen, beta 0.1 and weights 0.8 / 0.2 / 1.0.
    """
    config = stage_config("mixed_preference", f"recipe=internvl2_5_{size}", "data.meta=M")
    large = size in ("38b", "78b")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_ratio) == (1e-6, 0.05, 0.03)
    assert (config.data.batch_pairs, config.data.max_sample_tokens) == (512 if large else 256, 8192)
    assert (config.trainer.max_epochs, config.trainer.max_steps, config.stage.trainable) == (1, None, None)
    assert config.stage.drop_path_rate == (0.4 if size in ("26b", "38b", "78b") else 0.1)
    parts = config.preference.parts
    assert {name: part["weight"] for name, part in parts.items()} == {
        "preference": 0.8,
        "quality": 0.2,
        "generation": 1.0,
    }
    assert (parts["preference"]["head"]["beta"], parts["quality"]["head"]["update"]) == (0.1, "step")
    assert config.optim.decay == "all"


@pytest.mark.parametrize("name", names("preference"))
def test_every_mixture_can_be_built(name):
    config = stage_config("mixed_preference", "data.meta=M", f"preference={name}", "preference.beta=0.3")
    mixture = preference_options(config)["mixture"]
    assert mixture.heads["preference"].beta == 0.3
    assert set(mixture.heads) == {name for name, part in config.preference.parts.items() if part is not None}


def test_another_head_takes_the_place_of_a_part():
    """As docs/stages.md has it; an argument that a head does not take is named, with what to do."""
    hinge = "{_target_: ivl_lightning.losses.preference.HingePreference}"
    arguments = ["preference.parts.preference=null", f"+preference.parts.hinge={{weight: 0.8, head: {hinge}}}"]
    check_keys(arguments)
    mixture = preference_options(stage_config("mixed_preference", *arguments))["mixture"]
    assert {name: type(head).__name__ for name, head in mixture.heads.items()} == {
        "quality": "BCOPair",
        "generation": "SFT",
        "hinge": "HingePreference",
    }
    config = stage_config("mixed_preference", f"preference.parts.preference.head={hinge}")
    with pytest.raises(ConfigError, match=r"preference\.parts\.preference\.head cannot be built: .*label_smoothing"):
        preference_options(config)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.batch_pairs=1", "data.batch_pairs=1 is less than data.packs_per_step=2"),
        ("data.over_length=truncate", "would cut answers of preference pairs"),
        ("model.attention=flash_attention_2", "cannot let two answers share a prompt"),
        ("preference.beta=0", "preference.beta=0.0 must be above 0"),
        ("preference.parts.quality.head=null", "preference.parts.quality needs"),
        ("preference.parts={preference: null, quality: null, generation: null}", "preference.parts names no part"),
        ("preference.update=epoch", "preference.update='epoch'"),
        ("preference.reference=twice", "preference.reference='twice'"),
    ],
)
def test_wrong_settings_of_preference_training(argument, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        stage_config("mixed_preference", argument)


def test_pairs_are_asked_for_only_where_they_are_told():
    """A published recipe leaves its last stage out until it is told which pairs to learn from; a beta of the
    preference stage is nothing that decides stage 2, nor the reweighting anything that decides preference training.
    """
    tuning, other = (
        deciding_settings(stage_config("instruction_tuning", *arguments))
        for arguments in ((), ("preference.beta=0.2", "data.batch_pairs=8"))
    )
    assert tuning == other
    mixed, other = (
        deciding_settings(stage_config("mixed_preference", *arguments)) for arguments in ((), ("loss.reduction=token",))
    )
    assert mixed == other
    assert mixed["preference.beta"] == 0.1


def test_later_wins():
    """train.yaml < stage group < recipe entry < command line; recipe.stages.NAME reaches one stage alone."""
    assert stage_config("mlp_warmup").optim.lr != 7e-3
    assert stage_config("mlp_warmup", "optim.lr=7e-3").optim.lr == 7e-3
    one = "recipe.stages.mlp_warmup.optim.lr=7e-3"
    assert stage_config("mlp_warmup", one).optim.lr == 7e-3
    assert stage_config("instruction_tuning", one).optim.lr != 7e-3
    assert stage_config("mlp_warmup", one, "optim.lr=8e-3").optim.lr == 8e-3


def test_stage_data():
    text = stage_config("mlp_warmup", "stage_data.mlp_warmup=/data/one.json")
    assert text.data.meta == "/data/one.json"
    mapping = stage_config("mlp_warmup", "stage_data.mlp_warmup={meta: /two.json, max_tiles: 2}")
    assert (mapping.data.meta, mapping.data.max_tiles) == ("/two.json", 2)
    assert stage_config("instruction_tuning", "stage_data.mlp_warmup=/one.json").data.meta != "/one.json"


def test_stage_1_5_sees_the_data_of_stage_1():
    """A recipe of 2.5 says so; stage 2 keeps its own, and a name for stage 1.5 wins."""
    given = ["recipe=internvl2_5_8b", "data.meta=/two.json", "stage_data.mlp_warmup=/one.json"]
    assert stage_config("vit_incremental", *given).data.meta == "/one.json"
    assert stage_config("instruction_tuning", *given).data.meta == "/two.json"
    own = "stage_data.vit_incremental=/own.json"
    assert stage_config("vit_incremental", *given, own).data.meta == "/own.json"


def test_stage_names_and_aliases():
    assert stage_names([1, 1.5, "2"], []) == ["mlp_warmup", "vit_incremental", "instruction_tuning"]
    assert stage_names(None, ["instruction_tuning", "mlp_warmup"]) == ["mlp_warmup", "instruction_tuning"]
    assert stage_names(None, ["mine", "mlp_warmup"]) == ["mlp_warmup", "mine"]
    for wrong, message in (([], "no stage"), (["1", "mlp_warmup"], "twice")):
        with pytest.raises(ConfigError, match=message):
            stage_names(wrong, STAGES)
    with pytest.raises(ConfigError, match=r"stages=\['3'\] are not known: use language_warmup, .* stage/3\.yaml"):
        stage_config("3")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("seed=abc", r"seed='abc': input should be a valid integer"),
        ("optim.lr=fast", r"optim.lr='fast': input should be a valid number"),
        ("loss.reduction=squared", r"loss.reduction='squared': input should be 'token', 'sample' or 'square'"),
        ("trainer.max_steps=1.5", r"trainer.max_steps=1.5"),
        ("+optim.lrr=1", r"optim.lrr is not a setting. Did you mean lr\? Accepted here: betas"),
        ("+recipe.stages.mlp_warmup.optim.lrr=1", r"optim.lrr is not a setting. Did you mean lr\?"),
        ("data.meta=???", r"not given: data.meta"),
        ("trainer.devices=2", r"strategy=single runs one process.*trainer.devices=2"),
        ("data.tile_size=448", r"data.tile_size=448, but model.vision.image_size=64"),
        ("model.name=other", r"recipe=miniature has the numbers of model=miniature, but model=other"),
        ("stage.drop_path_rate=1.0", r"stage.drop_path_rate=1.0"),
        ("stage.trainable=[vit]", r"stage.trainable.0='vit': input should be 'vision', 'projector' or 'llm'"),
        ("data.val_rows=3", r"data.val_meta=.* and data.val_rows=3: give one"),
        ("eval.metric=accuracy", r"eval.metric='accuracy': input should be 'exact_match', .* or 'box_accuracy'"),
        ("eval.metrics={color: iou}", r"eval.metrics.color='iou': input should be 'exact_match'"),
        ("eval.max_tiles=[6,0]", r"eval.max_tiles=\[6, 0\] must be different numbers of at least 1"),
        ("eval.max_tiles=[6,6]", r"eval.max_tiles=\[6, 6\] must be different numbers of at least 1"),
        ("eval.probe_rows=-1", "eval.probe_rows=-1 must be at least 1, or 0"),
        ("eval.probe_every_n_steps=0", "eval.probe_every_n_steps=0 must be at least 1, or null"),
    ],
)
def test_wrong_settings_name_key_and_accepted_values(argument, message):
    with pytest.raises(ConfigError, match=message):
        stage_config("mlp_warmup", argument)


def test_a_donor_that_no_callback_brings():
    """Without the callback the run would start from another tower, silently."""
    assert stage_config("mlp_warmup", "scaling.donor=RUN").callbacks["progressive_scaling"]["donor"] == "RUN"
    with pytest.raises(ConfigError, match=r"scaling.donor=RUN, but no callback brings its tower"):
        stage_config("mlp_warmup", "scaling.donor=RUN", "callbacks=none")


def test_several_contradictions_are_listed_together():
    with pytest.raises(ConfigError, match=r"packs_per_step=2 cannot be dealt to 3[\s\S]*reject_limit=2.0"):
        stage_config("mlp_warmup", "trainer.devices=3", "strategy=ddp", "data.reject_limit=2.0")


def test_shards_of_a_node():
    """Four ranks: groups of two by their own, or of what `shard_size` says."""
    nodes = ["strategy=hsdp", "trainer.devices=2", "trainer.num_nodes=2", "data.packs_per_step=4"]
    assert stage_config("mlp_warmup", *nodes).strategy.shard_size is None
    assert stage_config("mlp_warmup", *nodes, "strategy.shard_size=4").strategy.shard_size == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["strategy=hsdp", "strategy.shard_size=3", "trainer.devices=4"],
            r"strategy.shard_size=3 cannot part 4 ranks \(trainer.devices=4 x trainer.num_nodes=1\) into equal groups",
        ),
        (["strategy=hsdp", "trainer.precision=bf16-mixed"], r"precision=bf16-mixed under strategy=hsdp"),
        (["strategy=fsdp", "strategy.shard_size=2"], r"shard_size=2 has no effect with strategy=fsdp"),
        (["strategy=ddp", "strategy.cpu_offload=true"], r"cpu_offload=true needs sharded weights, but strategy=ddp"),
        (["strategy.prefetch=2"], r"strategy.prefetch=2 needs sharded weights, but strategy=single: add strategy=fsdp"),
        (["strategy.sync_every_micro_batch=true"], r"sync_every_micro_batch=true needs sharded weights"),
        (["strategy=fsdp", "strategy.prefetch=-1"], r"strategy.prefetch=-1 is a number of blocks"),
        (["strategy=hsdp", "lora=llm", "lora.quantize=nf4"], r"nf4 cannot be sharded by strategy=hsdp"),
    ],
)
def test_switches_that_do_not_fit_a_strategy(arguments, message):
    with pytest.raises(ConfigError, match=message):
        stage_config("mlp_warmup", *arguments)


def test_misspelt_keys_before_hydra():
    check_keys(["optim.lr=1", "recipe.stages.mlp_warmup.optim.lr=1", "model=x", "hydra.run.dir=x", "callbacks.a.b=1"])
    for wrong in ("optim.lrr=1", "++optm.lr=1", "recipe.stages.mlp_warmup.optim.lrr=1", "data.metta=x"):
        with pytest.raises(ConfigError, match=r"is not a setting.*Did you mean"):
            check_keys([wrong])


def test_the_stage_group_is_not_for_users():
    with pytest.raises(ConfigError, match=r"use stages=\[mlp_warmup\]"):
        check_keys(["stage=mlp_warmup"])


def test_what_is_added_to_the_command_line():
    assert complete(["model=a", "x=1"], ["a"]) == ["recipe=a", "model=a", "x=1"]
    assert complete(["model=b"], ["a"]) == ["recipe=none", "model=b"]
    assert complete(["model=b", "recipe=a"], ["a"]) == ["model=b", "recipe=a"]
    assert complete(["-m", "model=b"], []) == ["-m", "recipe=none", "model=b"]
    assert complete(["model=b", "--cfg", "job"], []) == ["recipe=none", "model=b", "--cfg", "job"]
    assert complete(["data.meta=x"], []) == ["data.val_meta=null", "data.meta=x"]
    assert complete(["data.meta=x", "data.val_meta=y"], []) == ["data.meta=x", "data.val_meta=y"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1e-05,
        "plain",
        "it's",
        "a,b=c",
        "back\\slash",
        "end\\",
        "1e-5",
        "null",
        "",
        [1, "x", None],
        {"k": [0.5]},
    ],
)
def test_values_survive_the_override_grammar(value):
    """A recipe's values become overrides: type and text must come back as they were."""
    assert parse([f"key={literal(value)}"])[0].value() == value


def test_flatten_keeps_order():
    assert list(flatten({"a": {"b": 1, "c": {"d": None}}, "e": {}})) == ["++a.b=1", "++a.c.d=null", "++e={}"]
