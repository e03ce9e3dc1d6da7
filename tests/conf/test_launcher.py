"""`launcher=...`: presets compose with every recipe's rules, and a job's ranks run with what was submitted."""

from dataclasses import replace

import pytest
from hydra import initialize_config_module

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import LauncherConfig
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.finished import deciding_settings
from ivl_lightning.launch.ranks import Ranks, check_ranks

OWN = ("recipe=none", "model=custom", "data.meta=META", "data.packs_per_step=64")
PUBLISHED = ("recipe=internvl2_5_8b", "model=internvl2_5_8b", "data.meta=META")


@pytest.fixture(scope="module", autouse=True)
def hydra_configs():
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        yield


def stage_config(*arguments, base=OWN):
    return compose_stage("instruction_tuning", [*base, *arguments], run_dir="RUN")


@pytest.mark.parametrize("nodes", [4, 8])
def test_a_preset_sets_devices_nodes_and_sharding_together(nodes):
    config = stage_config(f"launcher=slurm_{nodes}x8", base=PUBLISHED)
    launcher, trainer = config.launcher, config.trainer
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (nodes, 8, 8)
    assert (trainer.num_nodes, trainer.devices, config.strategy.name) == (nodes, 8, "fsdp")


def test_the_command_line_wins_over_a_preset():
    config = stage_config("launcher=slurm_4x8", "trainer.num_nodes=2", "strategy=ddp", "launcher.partition=big")
    assert (config.launcher.nodes, config.launcher.partition, config.strategy.name) == (2, "big", "ddp")


def test_ranks_of_a_job_run_with_the_settings_that_were_submitted():
    """`launcher.name=none` behind the same arguments changes nothing else, what the preset set included."""
    submitted = stage_config("launcher=slurm_4x8")
    in_job = stage_config("launcher=slurm_4x8", "launcher.name=none")
    assert in_job == replace(submitted, launcher=replace(submitted.launcher, name="none"))


def test_where_a_stage_runs_is_not_what_it_learns():
    assert deciding_settings(stage_config("launcher=slurm")) == deciding_settings(stage_config())


def test_a_launcher_that_contradicts_the_trainer_or_itself_is_refused():
    with pytest.raises(ConfigError, match=r"launcher\.nodes=3 .* but trainer\.num_nodes=1"):
        stage_config("launcher=slurm", "launcher.nodes=3")
    with pytest.raises(ConfigError, match=r"launcher\.signal_seconds=600 must lie within launcher\.time_minutes=5"):
        stage_config("launcher=slurm", "launcher.signal_seconds=600", "launcher.time_minutes=5")
    # Where nothing is submitted, nothing of it counts.
    assert stage_config("launcher.nodes=3").launcher == replace(LauncherConfig(), nodes=3)


@pytest.mark.parametrize(
    ("ranks", "arguments", "remedy"),
    [
        (Ranks("torchrun", 1, 2, 1, 2), (), "add trainer.devices=2 trainer.num_nodes=1 strategy=ddp"),
        (Ranks("srun", 0, 16, 0, 8), ("strategy=fsdp", "trainer.devices=16"), "trainer.devices=8 trainer.num_nodes=2"),
        (Ranks(), ("strategy=fsdp", "trainer.devices=8", "trainer.num_nodes=2"), "or add launcher=slurm"),
    ],
)
def test_started_processes_that_the_settings_do_not_count_on(ranks, arguments, remedy):
    with pytest.raises(ConfigError) as error:
        check_ranks(ranks, {"instruction_tuning": stage_config(*arguments)})
    assert remedy in str(error.value)


def test_started_processes_that_the_settings_count_on():
    alone = stage_config("strategy=ddp", "trainer.devices=8")
    check_ranks(Ranks(), {"instruction_tuning": alone})
    check_ranks(Ranks("torchrun", 5, 8, 5, 8), {"instruction_tuning": alone})
    check_ranks(
        Ranks("srun", 9, 16, 1, 8), {"instruction_tuning": replace(alone, trainer=replace(alone.trainer, num_nodes=2))}
    )
