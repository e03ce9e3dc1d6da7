"""Internal: one job among others, `python -m ivl_lightning.cli.job` and the arguments of `train.py`."""

from ivl_lightning.cli.train import main
from ivl_lightning.launch.stage_process import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    main()
