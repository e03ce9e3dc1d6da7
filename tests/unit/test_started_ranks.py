"""Which process of how many: from the environments that torchrun and a real Slurm (22.05) have set."""

import pytest

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.ranks import Ranks, started_ranks

# As a script of `sbatch --ntasks=2` finds it, and the first part of what a step of srun in it does.
BATCH = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = BATCH | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "node[08-10]",
    "MASTER_ADDR": "node08",
}
# A shell of salloc is a step of its own where the cluster says so (use_interactive_step).
INTERACTIVE = BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("environment", [{}, BATCH, INTERACTIVE], ids=["shell", "sbatch", "salloc"])
def test_a_process_that_nobody_started_as_one_of_several_is_alone(environment):
    ranks = started_ranks(environment)
    assert ranks == Ranks()
    # Somebody's RANK, which no starter vouches for, would make the stage wait for others.
    stage = ranks.stage_environment(environment | {"RANK": "1", "LOCAL_RANK": "1", "OTHER": "kept"}, 0)
    assert stage == environment | {"OTHER": "kept"}


def test_ranks_of_torchrun():
    """The third stage that is started meets three ports behind torchrun's own, with a rendezvous of its own."""
    ranks = started_ranks(TORCHRUN)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, ranks.node) == (3, 4, 1, 2, 1)
    assert ranks.store_of_starter
    stage = ranks.stage_environment(TORCHRUN, 2)
    assert stage["MASTER_PORT"] == "29503"
    assert "TORCHELASTIC_USE_AGENT_STORE" not in stage
    assert {key: stage[key] for key in TORCHRUN if "RANK" in key} == {k: v for k, v in TORCHRUN.items() if "RANK" in k}


def test_torchrun_inside_of_a_step_counts():
    """`srun --ntasks-per-node=1 torchrun ...`: each task is an agent, and its processes are the ranks."""
    assert started_ranks(STEP | TORCHRUN).starter == "torchrun"


def test_ranks_of_srun():
    """Job 12, step 0: block 12 * 7 of 32 ports each, above 10,000: 10000 + 84 * 32 = 12688."""
    ranks = started_ranks(STEP)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size, ranks.node) == (5, 6, 1, 2, 2)
    assert (ranks.host, ranks.port, ranks.store_of_starter) == ("node08", 12688, False)
    stage = ranks.stage_environment(STEP, 0)
    assert (stage["RANK"], stage["WORLD_SIZE"], stage["GROUP_RANK"], stage["MASTER_PORT"]) == ("5", "6", "2", "12689")


def test_no_two_steps_that_run_side_by_side_share_a_port():
    """Neighbors in the queue, and two steps of a job, each with its 31 stages."""
    taken = set()
    for job in range(100, 140):
        for step in range(2):
            first = started_ranks(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
            ports = set(range(first, first + 32))
            assert not ports & taken
            assert max(ports) < 32_768
            taken |= ports


def test_unequal_nodes_are_refused():
    with pytest.raises(ConfigError, match=r"srun started 5 tasks on 3 nodes \(2\(x3\)\).*--ntasks-per-node"):
        started_ranks(STEP | {"SLURM_STEP_NUM_TASKS": "5"})
