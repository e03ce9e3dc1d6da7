"""`ivl-preferences model.path=FOLDER data.meta=META output=DIR`: a model's own answers as preference pairs."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from ivl_lightning.config.check import ConfigError, load
from ivl_lightning.config.preferences import PreferencesConfig, check_preferences
from ivl_lightning.launch.compose import plain_values
from ivl_lightning.launch.overrides import forced

if TYPE_CHECKING:
    from ivl_lightning.curation.summary import Summary

MISTAKE, NO_PAIRS, INTERRUPTED = 2, 3, 130


def main() -> None:
    """The command: exit code 0, 2 with a message for a mistake of the user's, 3 where no pair could be made."""
    try:
        sys.argv[1:] = forced(sys.argv[1:])
        _main()
    except ConfigError as error:
        _stop(error)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


@hydra.main(version_base="1.3", config_path="pkg://ivl_lightning.conf", config_name="preferences")
def _main(composed: DictConfig) -> None:
    try:
        config = read_config(composed)
    except ConfigError as error:
        _stop(error)
    # Imported late: --help and wrong settings need no torch.
    from ivl_lightning.curation.summary import print_summary
    from ivl_lightning.data.storage import MachineError

    try:
        summary = run(config)
    except (ValueError, MachineError) as error:
        _stop(error)
    print_summary(summary)
    if not summary.pairs:
        print(f"no pair could be made: {config.output}/summary.json says why", file=sys.stderr)
        sys.exit(NO_PAIRS)
    print(f"pairs: {summary.meta}")


def read_config(composed: DictConfig) -> PreferencesConfig:
    """Check the composed settings.

    Raises:
        ConfigError: names every missing, misspelt or wrong one.
    """
    config = load(PreferencesConfig, plain_values(composed))
    check_preferences(config)
    if config.model.path is None:
        raise ConfigError("model.path is missing: give the folder of the model that answers")
    return config


def run(config: PreferencesConfig) -> Summary:
    """Load the model and make the pairs.

    Raises:
        ValueError: as `build_pairs`, or a folder that holds no such model.
    """
    import torch

    from ivl_lightning.curation.build import build_pairs
    from ivl_lightning.launch.network import tokenizer_of, with_template
    from ivl_lightning.models.loader import build_model

    config = replace(config, model=with_template(config.model))
    tokenizer = tokenizer_of(config.model)
    # Rows that the vocabulary grows by are random: they must be the same when the command goes on.
    torch.manual_seed(config.seed)
    return build_pairs(config, build_model(config.model, tokenizer), tokenizer)


def _stop(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(MISTAKE)


if __name__ == "__main__":
    main()
