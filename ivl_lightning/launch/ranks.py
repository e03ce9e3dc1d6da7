"""Which of how many processes this one is: started by torchrun, by srun, or alone."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import RunConfig

Starter = Literal["torchrun", "srun", "alone"]

# Of the starter's own processes; a stage's process has others, or, started alone, must have none.
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
# With it torch would look for the stage's own meeting point in torchrun, where nobody makes a second one.
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
# Below the ports that Linux gives to outgoing connections (32768 and up); a block of ports for each step of a job.
_FIRST_PORT, _BLOCKS, _PORTS_PER_BLOCK = 10_000, 625, 32


@dataclass(frozen=True, slots=True)
class Ranks:
    """This launching process among those that one command was started as.

    Attributes:
        starter: who started them.
        rank, world_size: which of how many.
        local_rank, local_world_size: the same on this machine.
        node: number of this machine.
        host: where rank 0 runs, as the others reach it.
        port: where the launching processes meet; stages take the ports behind it.
        store_of_starter: whether the starter listens at that port; else rank 0 does.
    """

    starter: Starter = "alone"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    host: str = "localhost"
    port: int = 0
    store_of_starter: bool = False

    def stage_environment(self, environment: Mapping[str, str], index: int) -> dict[str, str]:
        """Environment of the process of a stage.

        Args:
            environment: of this process.
            index: how many stages this command has started before; each has a port of its own.
        """
        kept = {key: value for key, value in environment.items() if key not in (*_OF_RANKS, _AGENT_STORE)}
        if self.starter == "alone":
            return kept
        return kept | {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port + 1 + index),
        }


def started_ranks(environment: Mapping[str, str]) -> Ranks:
    """Read what torchrun or srun has set.

    Raises:
        ConfigError: machines with different numbers of processes, or a host of rank 0 that nobody names.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return _of_torchrun(environment)
    # A script of sbatch and a shell of salloc have SLURM_NTASKS and SLURM_PROCID too, but are one process; only srun
    # says how many tasks its step has. An interactive shell is a step of one task.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _of_srun(environment)
    return Ranks()


def _of_torchrun(environment: Mapping[str, str]) -> Ranks:
    return Ranks(
        starter="torchrun",
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        local_world_size=int(environment["LOCAL_WORLD_SIZE"]),
        node=int(environment["GROUP_RANK"]),
        host=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        store_of_starter=environment.get(_AGENT_STORE) == "True",
    )


def _of_srun(environment: Mapping[str, str]) -> Ranks:
    tasks, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_STEP_NUM_NODES"])
    if tasks % nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} nodes ({environment.get('SLURM_STEP_TASKS_PER_NODE')}), so nodes "
            "have different numbers of them: start as many on each, srun --ntasks-per-node=N"
        )
    return Ranks(
        starter="srun",
        rank=int(environment["SLURM_PROCID"]),
        world_size=tasks,
        local_rank=int(environment["SLURM_LOCALID"]),
        local_world_size=tasks // nodes,
        node=int(environment["SLURM_NODEID"]),
        host=environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"]),
        port=int(environment.get("MASTER_PORT") or _port_of_step(environment)),
    )


def _first_host(nodes: str) -> str:
    """Of a list as Slurm writes it, `node[08-11]`: task 0 of a step runs on its first node."""
    program = shutil.which("scontrol")
    if program is None:
        raise ConfigError(f"there is no scontrol here to read {nodes}: export MASTER_ADDR=HOST, where task 0 runs")
    listed = subprocess.run([program, "show", "hostnames", nodes], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise ConfigError(
            f"scontrol cannot read {nodes}: {listed.stderr.strip()}. Export MASTER_ADDR=HOST, where task 0 runs"
        )
    return listed.stdout.split()[0]


def _port_of_step(environment: Mapping[str, str]) -> int:
    """The same on every node, and another for jobs and steps that may share one."""
    block = (int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])) % _BLOCKS
    return _FIRST_PORT + block * _PORTS_PER_BLOCK


def check_ranks(ranks: Ranks, configs: Mapping[str, RunConfig]) -> None:
    """The processes that were started must be those that the settings count on.

    Args:
        ranks: that were started.
        configs: stage name -> its configuration.

    Raises:
        ConfigError: they are not; says what to add.
    """
    for name, config in configs.items():
        devices, nodes = config.trainer.devices, config.trainer.num_nodes
        if ranks.starter == "alone":
            if nodes > 1:
                raise ConfigError(_other_nodes_missing(name, config))
        elif (devices, nodes * devices) != (ranks.local_world_size, ranks.world_size):
            raise ConfigError(_other_count(name, config, ranks))


def _other_nodes_missing(name: str, config: RunConfig) -> str:
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    return (
        f"stage {name}: trainer.num_nodes={nodes}, but this command was started on one: start it on each with "
        f"torchrun --nnodes={nodes} --nproc_per_node={devices} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 train.py "
        f"..., with srun --nodes={nodes} --ntasks-per-node={devices} python train.py ..., or add launcher=slurm"
    )


def _other_count(name: str, config: RunConfig, ranks: Ranks) -> str:
    nodes = ranks.world_size // ranks.local_world_size
    wanted = [f"trainer.devices={ranks.local_world_size}", f"trainer.num_nodes={nodes}"]
    if config.strategy.name == "single" and ranks.world_size > 1:
        wanted.append("strategy=ddp (or fsdp)")
    return (
        f"stage {name}: {ranks.starter} started {nodes} x {ranks.local_world_size} processes (nodes x processes), but "
        f"trainer.devices={config.trainer.devices} and trainer.num_nodes={config.trainer.num_nodes} "
        f"ask for {config.trainer.devices * config.trainer.num_nodes}: add {' '.join(wanted)}"
    )
