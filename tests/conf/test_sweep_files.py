"""Sweeps: from YAML to the command that an agent of W&B starts, by its own functions, and to our typed settings."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module

from ivl_lightning.config.check import ConfigError
from ivl_lightning.launch.agent_arguments import plain_arguments, settings
from ivl_lightning.launch.compose import compose_stage
from ivl_lightning.launch.loggers import build_loggers
from ivl_lightning.launch.overrides import check_keys, complete, parse
from ivl_lightning.launch.sweep_file import read_sweep_file
from ivl_lightning.launch.sweep_search import Trial, hopeless, suggest, violations
from ivl_lightning.miniature.tasks import KINDS

CONF = Path(__file__).parents[2] / "conf"
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
AGENT = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r7"}


@pytest.fixture(scope="module", autouse=True)
def hydra_configs():
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        yield


def agent_argv(command, args):
    """What `wandb agent` starts, as its `_command_run` puts it together from the functions of W&B."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    macros = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in args.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": ["train.py"]}
    argv = []
    for part in utils.create_sweep_command(list(command)):
        argv += macros.get(part[2:-1]) or [] if part.startswith("${") and part.endswith("}") else [part]
    return argv


def composed(stage, arguments):
    arguments = complete(plain_arguments(arguments), [])
    check_keys(arguments)
    return compose_stage(stage, arguments, run_dir="RUN")


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_reaches_its_runs_through_the_agent_and_here(name, monkeypatch):
    """What is suggested arrives as typed settings by either way, and is the same; every run has a folder of its own."""
    for variable, value in AGENT.items():
        monkeypatch.setenv(variable, value)
    definition = yaml.safe_load((CONF / f"sweep/{name}.yaml").read_text())
    assert violations(definition) == []
    file = read_sweep_file(name)
    values = suggest(file.definition, [], seed=1)
    argv = agent_argv(definition["command"], json.loads(json.dumps(values)))
    assert argv[:3] == ["/usr/bin/env", "python", definition["program"]]
    stage = parse([argument for argument in argv if argument.startswith("stages=")])[0].value()[0]
    run_dirs = [argument for argument in parse(plain_arguments(argv[3:])) if argument.key_or_group == "run_dir"]
    assert [override.value() for override in run_dirs] == [
        "runs/sweeps/${oc.env:WANDB_SWEEP_ID}/${oc.env:WANDB_RUN_ID}"
    ]
    by_agent = composed(stage, [*argv[3:], "data.meta=M"])
    here = composed(stage, [*file.arguments, "logger=wandb", *settings(values), "data.meta=M"])
    assert by_agent == here
    found = {key: at(by_agent, key) for key in values}
    assert found == values
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in values.items()}


def at(config, key):
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def test_the_template_of_a_mixture_names_all_datasets_of_the_miniature():
    """`data.weights` must: as it stands it can be tried."""
    names = read_sweep_file("mixture").definition["parameters"]
    assert list(names) == [f"data.weights.{kind}" for kind in KINDS]


def test_a_run_folder_follows_from_the_agents_run(monkeypatch):
    for variable, value in AGENT.items():
        monkeypatch.setenv(variable, value)
    argument = next(
        part for part in yaml.safe_load((CONF / "sweep/miniature.yaml").read_text())["command"] if "run_dir" in part
    )
    assert compose("train", overrides=plain_arguments([argument])).run_dir == "runs/sweeps/s1/r7"


NASTY = {
    "init_from": None,
    "trainer.progress_bar": False,
    "trainer.max_steps": 7,
    "optim.lr": 1e-05,
    "optim.betas": [0.9, 0.95],
    "optim.lr_by_part": {"vision": 1e-06, "projector": None, "llm": 0.1},
    "data.weights": {"a": 1.0, "b-c": 2.5},
    "data.exclude": "odd name=1, it's (a) [list]: {x} 100%; ä.jsonl",
    "data.val_meta": "None",
    "stages": ["instruction_tuning"],
    "stage_data.mlp_warmup": "1e-5",
    "lora": "llm",
}


def test_every_type_arrives_through_json():
    """`${args_json}`: null, booleans, lists, mappings, and text with every sign that means something to Hydra."""
    (argument,) = agent_argv(["${args_json}"], NASTY)
    config = composed("instruction_tuning", [argument, "data.meta=M"])
    for key, value in NASTY.items():
        if key == "lora":
            assert config.lora.parts == ["llm"]
        elif key == "optim.lr_by_part":
            assert config.optim.lr_by_part == value
        else:
            assert at(config, key) == value, key


def test_nested_parameters_arrive():
    """W&B gives nested parameters of a YAML as nested mappings."""
    nested = {"optim": {"lr": 0.5, "lr_by_part": {"llm": None}}, "loss": {"reduction": "token"}}
    for macro in ("${args_json}", "${args_no_hyphens}"):
        config = composed("instruction_tuning", [*agent_argv([macro], nested), "data.meta=M"])
        assert (config.optim.lr, config.loss.reduction) == (0.5, "token")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (False, False),
        (3, 3),
        (1e-05, 1e-05),
        (float("inf"), float("inf")),
        ([1, 2.5, "a"], [1, 2.5, "a"]),
        (["a", None, True], ["a", None, True]),
        ([[0.9, None]], [[0.9, None]]),
        ([{"a": None}], [{"a": None}]),
        ({"a": None, "b c": [1]}, {"a": None, "b c": [1]}),
        ([], []),
        ("a b", "a b"),
        ("a=b", "a=b"),
        ("it's", "it's"),
        ("ä;#!", "ä;#!"),
        ("", ""),
        # Such text reads as the value that it spells, which `${args_json}` avoids.
        ("1e-5", 1e-05),
        ("null", None),
        ("None", None),
    ],
)
def test_values_as_python_writes_them(value, expected):
    """`${args_no_hyphens}` is `key=str(value)`: what can only be one thing arrives as that."""
    (argument,) = agent_argv(["${args_no_hyphens}"], {"data.x": value})
    (override,) = parse(plain_arguments([argument]))
    assert override.value() == expected
    assert type(override.value()) is type(expected)


@pytest.mark.parametrize(
    "argument",
    [
        "optim.lr=1e-5,2e-5",
        "x=[1,2",
        "x={a:1}",
        "x='None'",
        'x="a=b"',
        "x=${y",
        "x=range(1,5)",
        "~x",
        "--cfg=job",
        "hydra.searchpath=[a]",
        "-m",
    ],
)
def test_what_people_write_for_hydra_stays(argument):
    assert plain_arguments([argument]) == [argument]


def test_what_begins_as_json_and_is_none_is_named():
    with pytest.raises(ConfigError, match="begins as a JSON object of settings"):
        plain_arguments(["{'optim.lr': 1}"])


def test_metrics_go_to_the_run_that_the_agent_waits_for(monkeypatch, tmp_path):
    """W&B's agent has made the run before it starts us; an id of our own would leave it empty."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_ID", "r7")
    config = composed("instruction_tuning", ["logger=wandb_offline", "data.meta=M"])
    logger = next(logger for logger in build_loggers(config, tmp_path) if type(logger).__name__ == "WandbLogger")
    assert logger.version == "r7"
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    again = next(logger for logger in build_loggers(config, tmp_path) if type(logger).__name__ == "WandbLogger")
    assert again.version == "r7"


def write(folder, **changes):
    definition = {
        "method": "grid",
        "metric": {"name": "val/loss"},
        "parameters": {"optim": {"parameters": {"lr": {"values": [1, 2]}}}, "seed": {"values": [3, 4]}},
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**definition, **changes}))
    return str(path)


def test_a_file_of_ones_own(tmp_path):
    """Nested parameters have dotted names; of the command only what every run is given here too."""
    command = ["${program}", "stages=[2]", "logger=wandb", "run_dir=x", "+data.weights.a=1", "${args_json}"]
    file = read_sweep_file(write(tmp_path, command=command, run_cap=3, metric={"name": "val/loss", "target": 0.5}))
    assert (file.name, file.metric, file.maximize, file.run_cap, file.is_grid) == ("mine", "val/loss", False, 3, True)
    assert list(file.definition["parameters"]) == ["optim.lr", "seed"]
    assert file.arguments == ("stages=[2]", "+data.weights.a=1")
    assert (file.is_reached(0.6), file.is_reached(0.5)) == (False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hill"}, "'hill' is not one of"),
        ({"metric": None}, "None is not of type 'object'"),
        ({"parameters": {"optim.lr": {"values": ["1e-5"]}}}, "optim.lr: YAML reads 1e-5 as text: write 1.0e-5"),
        ({"parameters": {"optim.lr": {"value": "2.0E5"}}}, "YAML reads 2.0E5 as text: write 2.0e+5"),
        ({"parameters": {"optim.lrr": {"values": [1]}}}, "optim.lrr is not a setting. Did you mean lr?"),
        ({"parameters": {"optim.lr": {"min": 2.0, "max": 1.0}}}, "min 2.0 is not less than max 1.0"),
        ({"parameters": {"optim.lr": 3}}, "Invalid configuration for hyperparameter 'optim.lr'"),
        ({"method": "custom"}, "method=custom is carried out by nobody here"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_starts(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_sweep_file(write(tmp_path, **changes))


def test_a_file_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match="neither a file nor one of conf/sweep: miniature, mixture, mpo_weights"):
        read_sweep_file("mini")


def walked(definition, count, seed=0):
    """Suggestions one after the other, each run ending with its number as the metric."""
    trials = []
    for number in range(count):
        values = suggest(definition, trials, seed)
        if values is None:
            break
        trials.append(Trial(number, values, "finished", [float(number)]))
    return [trial.values for trial in trials]


def test_a_grid_is_walked_once(tmp_path):
    """2 x 2 points, then none: also where the parameters are nested, which the package alone walks for ever."""
    file = read_sweep_file(write(tmp_path))
    points = walked(file.definition, 9)
    assert len(points) == 4
    assert sorted((point["optim.lr"], point["seed"]) for point in points) == [(1, 3), (1, 4), (2, 3), (2, 4)]


@pytest.mark.parametrize("name", ["mixture", "mpo_weights", "miniature"])
def test_a_search_is_the_same_again_with_its_seed(name):
    """Plain values of Python, within their bounds, from the seed and from what was reached."""
    definition = read_sweep_file(name).definition
    points = walked(definition, 3, seed=5)
    assert walked(definition, 3, seed=5) == points
    assert walked(definition, 3, seed=6) != points
    assert json.loads(json.dumps(points)) == points
    for key, spec in definition["parameters"].items():
        if "min" in spec:
            assert all(type(point[key]) is float and spec["min"] <= point[key] <= spec["max"] for point in points)


def test_hyperband_stops_whom_the_others_have_left_behind(tmp_path):
    """min_iter 1 and eta 2: looked at in the 2nd entry, where the losses 1, 2 and 8 have the median 2. Only the third
    run, whose best is 8, lies above it; one with a single entry is not looked at, one that has ended is not stopped.
    """
    early = {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}
    definition = read_sweep_file(write(tmp_path, **early)).definition
    histories = {0: [9, 1], 1: [9, 2], 2: [9, 8], 3: [50]}
    states = {0: "finished", 1: "running", 2: "running", 3: "running"}
    trials = [Trial(number, {}, states[number], history) for number, history in histories.items()]
    assert hopeless(definition, trials) == [2]
    assert hopeless({**definition, "metric": {"name": "x", "goal": "maximize"}}, trials[:3]) == []
    assert hopeless(read_sweep_file(write(tmp_path)).definition, trials) == []
