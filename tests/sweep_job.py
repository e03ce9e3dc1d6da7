"""A job of a search that logs losses without training; it takes the arguments of `train.py`.

Its loss after step n is lr + 1 / n. With lr=13 it fails; with one above 100 it goes on until it is asked to stop, and
ends as a stage does that has saved.
"""

import json
import signal
import sys
import time
from pathlib import Path

from ivl_lightning.constants import METRICS_NAME, PREEMPTED_EXIT_CODE

STEPS = 4


def main():
    # The last of a key counts.
    values = {key.lstrip("+"): text for key, _, text in (argument.partition("=") for argument in sys.argv[1:])}
    rate = float(values["optim.lr"])
    if rate == 13:
        sys.exit("error: thirteen brings no luck")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED_EXIT_CODE))
    folder = Path(values["run_dir"].strip("'")) / "instruction_tuning"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS_NAME).open("a") as file:
        for step in range(1, STEPS + 1):
            file.write(json.dumps({"step": step, "val/loss": rate + 1 / step}) + "\n")
    deadline = time.monotonic() + 60
    while rate > 100 and time.monotonic() < deadline:
        time.sleep(0.05)


if __name__ == "__main__":
    main()
