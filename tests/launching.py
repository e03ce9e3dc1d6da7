"""A launching process with stand-ins for its stages: python -m tests.launching SCRIPT FOLDER...

The script runs as the stage's process of each rank, with the stage's folder as its argument.
"""

import json
import os
import sys
from pathlib import Path

from ivl_lightning.launch.crew import Crew
from ivl_lightning.launch.ranks import started_ranks
from ivl_lightning.launch.signals import StopRequestedError


def main() -> None:
    script, *folders = sys.argv[1:]
    crew = Crew(started_ranks(os.environ), command=(sys.executable, script))
    with crew.listening():
        if crew.ranks.rank > 0:
            sys.exit(crew.follow())
        with crew.leading():
            _lead(crew, folders)


def _lead(crew: Crew, folders: list[str]) -> None:
    try:
        codes = [crew.run(Path(folder)) for folder in folders]
    except StopRequestedError as stop:
        sys.exit(str(stop))
    print(json.dumps({"codes": codes, "requeue": crew.wants_requeue}))
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
