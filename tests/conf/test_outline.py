"""What a dry run says of a stage, from its composed settings and the files it names."""

import json

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import OmegaConf

from ivl_lightning.config.check import ConfigError
from ivl_lightning.constants import STAGES
from ivl_lightning.launch.chain import run_chain
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.dry_run import stand_ins
from ivl_lightning.launch.finished import Finished, deciding_settings
from ivl_lightning.launch.meta_rows import read_rows
from ivl_lightning.launch.outline import DEFAULT_TRAINABLE, human, number, outline, steps_of, trained
from ivl_lightning.launch.outline_inputs import NOT_GIVEN
from ivl_lightning.launch.run_stage import write_config
from ivl_lightning.launch.start import HOW_TO_START, how_to_give_tower


@pytest.fixture(scope="module", autouse=True)
def hydra_configs():
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        yield


def stage_config(name, *arguments, run_dir="RUN"):
    return compose_stage(name, arguments, run_dir=str(run_dir))


def lines(config, before=None):
    """Label -> texts, each with its fault in front."""
    found = {}
    for line in outline(config.stage.name, config, before, {}):
        found.setdefault(line.label, []).append(f"{line.fault} {line.text}".strip())
    return found


def write_meta(folder, *, lengths=(None, None)):
    """5 rows seen twice and 7 rows of which half are seen: 10 + 3 samples an epoch."""
    entries = {}
    for (name, rows, repeat), length in zip((("one", 5, 2), ("two", 7, 0.5)), lengths, strict=True):
        (folder / f"{name}.jsonl").write_text('{"id": 0}\n' * rows)
        entries[name] = {"root": ".", "annotation": f"{name}.jsonl", "data_augment": False, "repeat_time": repeat}
        entries[name] |= {} if length is None else {"length": length}
    (folder / "meta.json").write_text(json.dumps(entries))
    return folder / "meta.json"


@pytest.mark.parametrize("name", STAGES)
def test_what_stages_train_is_what_their_classes_say(name):
    target = stage_config(name).stage._target_
    assert DEFAULT_TRAINABLE[target.rpartition(".")[2]] == get_class(target).default_trainable


def test_what_trains_with_adapters_and_last_layers():
    config = stage_config("instruction_tuning", "lora=all", "lora.rank=4", "stage.trainable=[vision,llm,projector]")
    assert trained(config) == "vision by LoRA (rank 4), llm by LoRA (rank 4), projector"
    config = stage_config("vit_incremental", "stage.trainable_vision_layers=1")
    assert trained(config) == "vision (last 1 layer), projector"


def test_where_to_start_is_told_in_the_words_of_the_chain():
    config = stage_config("mlp_warmup", "recipe=internvl2_5_8b", "data.meta=x")
    assert lines(config)["starts from"] == [f"missing weights to start from: {HOW_TO_START}"]
    with pytest.raises(ConfigError) as error:
        run_chain({"mlp_warmup": config})
    assert str(error.value).endswith(f"weights to start from: {HOW_TO_START}")


def test_parts_and_the_tower_that_a_recipe_wants(tmp_path):
    language = f"model.language_model_path={tmp_path}"
    arguments = ("recipe=internvl2_5_78b", "data.meta=x", "++recipe.donor=internvl2_5_8b", language)
    found = lines(stage_config("mlp_warmup", *arguments))
    assert found["starts from"] == [f"{tmp_path} (model.language_model_path)"]
    assert found["tower from"] == [f"missing a vision tower: {how_to_give_tower('internvl2_5_8b')}"]
    with pytest.raises(ConfigError) as error:
        run_chain({"mlp_warmup": stage_config("mlp_warmup", *arguments)})
    assert str(error.value).endswith(how_to_give_tower("internvl2_5_8b"))
    nothing = lines(stage_config("mlp_warmup", *arguments[:-1], "model.random_weights=true"))
    assert nothing["starts from"] == ["random weights"]
    assert nothing["tower from"] == [f"random weights; for a trained one {how_to_give_tower('internvl2_5_8b')}"]
    found = lines(stage_config("mlp_warmup", *arguments, f"model.vision_path={tmp_path}/not/there"))
    assert found["starts from"][0] == f"missing {tmp_path}/not/there (model.vision_path)"
    assert "tower from" not in found
    found = lines(stage_config("mlp_warmup", *arguments, f"scaling.donor={tmp_path}"))
    assert found["tower from"] == [
        f"wrong scaling.donor={tmp_path}: neither a folder of weights nor a run with a finished stage"
    ]
    (tmp_path / "config.json").write_text("{}")
    found = lines(stage_config("mlp_warmup", *arguments, f"scaling.donor={tmp_path}"), before="language_warmup")
    assert found["starts from"] == ["weights of language_warmup"]
    assert found["tower from"] == [f"{tmp_path} (scaling.donor; its projector too where it fits)"]


def test_steps_from_rows_repeats_and_batches(tmp_path):
    """13 samples in batches of 4 are 4 steps, of 3 epochs 12; 4 of 12 rows held back leave about 9 samples."""
    meta = write_meta(tmp_path)
    rows = read_rows(str(meta))
    assert [(dataset.rows, dataset.samples) for dataset in rows.datasets] == [(5, 10), (7, 3)]
    arguments = (f"data.meta={meta}", "data.val_meta=null", "trainer.max_epochs=3", "trainer.max_steps=null")
    batched = ("data.batch_samples=4", *arguments)
    assert steps_of(stage_config("mlp_warmup", *batched), rows) == (12, True)
    assert steps_of(stage_config("mlp_warmup", *batched, "data.val_rows=4"), rows) == (9, False)
    assert steps_of(stage_config("mlp_warmup", *batched, "trainer.max_steps=5"), rows) == (5, True)
    assert steps_of(stage_config("mlp_warmup", *arguments), rows) == (None, False)
    assert steps_of(stage_config("mlp_warmup", *batched), None) == (None, False)
    assert steps_of(stage_config("mixed_preference", *arguments, "data.batch_pairs=6"), rows) == (9, True)


def test_rows_that_the_meta_tells_are_not_counted(tmp_path):
    rows = read_rows(str(write_meta(tmp_path, lengths=(None, 1000))))
    assert [(dataset.rows, dataset.counted) for dataset in rows.datasets] == [(5, True), (1000, False)]
    assert (rows.samples, rows.counted) == (510, False)


def test_rows_of_large_files_are_estimated(tmp_path, monkeypatch):
    """Rows of 10 bytes each: what lies behind the first few is taken to be alike."""
    monkeypatch.setattr("ivl_lightning.launch.meta_rows._BYTES_COUNTED", 40)
    meta = write_meta(tmp_path)
    (tmp_path / "two.jsonl").write_text('{"id": 0}\n' * 700)
    sizes = [(dataset.rows, dataset.counted) for dataset in read_rows(str(meta)).datasets]
    assert not any(counted for _, counted in sizes)
    assert [rows for rows, _ in sizes] == pytest.approx([5, 700], rel=0.05)


def test_data_files_that_are_there_are_made_or_are_missing(tmp_path):
    meta = write_meta(tmp_path)
    found = lines(stage_config("mlp_warmup", f"data.meta={meta}", "data.val_meta=null", "data.val_rows=2"))
    assert found["data"] == [f"{meta}: 2 datasets, 12 rows"]
    assert found[""] == ["one  5 rows x 2", "two  7 rows x 0.5"]
    assert found["validation"] == ["2 rows of the data, held back"]
    found = lines(stage_config("mlp_warmup", f"data.meta={tmp_path}/other.json"))
    assert found["data"] == [f"missing file {tmp_path}/other.json"]
    assert found["validation"] == ["RUN/miniature/val_meta.json, made by miniature.prepare.prepare"]
    meta.write_text("{}")
    read_rows.cache_clear()
    assert lines(stage_config("mlp_warmup", f"data.meta={meta}"))["data"][0].startswith(f"wrong {meta}: expected an")


def test_datasets_and_rows_that_a_recipe_does_not_expect(tmp_path):
    """A meta that tells its rows is believed by nobody, so only what was counted can be wrong."""
    arguments = (
        f"data.meta={write_meta(tmp_path, lengths=(None, 1000))}",
        "++data.expected_rows={one:6,two:7,three:1}",
    )
    found = lines(stage_config("mlp_warmup", *arguments))
    assert found[""][:2] == [
        "wrong dataset three is expected, and not there (data.expected_rows)",
        "wrong dataset one has 5 rows, 6 expected (data.expected_rows)",
    ]
    assert len([text for text in found[""] if text.startswith("wrong")]) == 2


def test_state_of_a_stage(tmp_path):
    """New, begun, finished; and begun or finished with other settings, which the chain would refuse."""
    config = stage_config("mlp_warmup", "dry_run=true", run_dir=tmp_path)
    other = stage_config("mlp_warmup", "optim.lr=1.0", "dry_run=true", run_dir=tmp_path)
    real = stage_config("mlp_warmup", run_dir=tmp_path)
    folder = tmp_path / "mlp_warmup"
    assert lines(config)["state"] == ["new"]
    write_config(real, folder)
    assert lines(config)["state"] == ["new"]
    (folder / "checkpoints").mkdir()
    for step in (80, 120):
        (folder / f"checkpoints/step={step:08d}.ckpt").touch()
    assert lines(config)["state"] == ["begun: it goes on at step 120"]
    assert lines(other)["state"][0].startswith(f"wrong {folder} was begun with optim.lr=0.002, this command says 1.0")
    Finished("mlp_warmup", deciding_settings(real), "random", "", ["projector"], 1500, 2.0, 1.0).write(folder)
    assert lines(config)["state"] == ["finished after 1,500 steps: it is skipped"]
    assert lines(other)["state"][0].startswith(f"wrong {folder} was finished with optim.lr=0.002")


def test_a_meta_that_is_not_given_yields_to_one_that_is():
    """Stand-ins are for the stages that nobody gives a meta: command line and recipe come first."""
    recipe = ("recipe=internvl2_5_8b", "++recipe.stages.mlp_warmup.data.meta=own.json")
    arguments = (*recipe, "stage_data.mixed_preference=pairs.json")
    added = stand_ins(compose("train", overrides=list(arguments)))
    metas = {name: stage_config(name, *arguments, *added).data.meta for name in STAGES}
    assert metas == {
        "language_warmup": NOT_GIVEN,
        "mlp_warmup": "own.json",
        "vit_incremental": NOT_GIVEN,
        "instruction_tuning": NOT_GIVEN,
        "mixed_preference": "pairs.json",
    }
    assert stand_ins(OmegaConf.create({"data": {"meta": "x"}})) == []


def test_numbers_for_people():
    assert [human(value) for value in (7, 5500 * 512 * 16384, 999_700, 1.678e12)] == ["7", "46.1 B", "1 M", "1.68 T"]
    assert [number(value) for value in (4e-5, 1.5e-3, 0.05, 0, 1)] == ["4e-5", "1.5e-3", "0.05", "0", "1"]
