"""What a carried vision tower saves: the miniature's story with three seeds. `make bench`.

    bench_scaling.py --seeds 0 1 2 --runs FOLDER    other seeds; keep the runs, and go on with those that are there

Each seed trains a small model through stage 1.5, carries its tower to a language model twice as large (stages 1 and 2
there), and trains a control with the same steps from a fresh tower. The ratio is tokens until the carried run first has
the control's final score, over the tokens at which the control first had it; validations every 20 steps, nothing
interpolated. The tokens that had trained the tower before are not in it: in the use that this is for, one tower serves
many language models. Two seeds run side by side, one thread each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ivl_lightning.reporting.run_folder import Run, read_run
from ivl_lightning.reporting.scaling import final_score, first_reaching, scaling_ratio, score_curve
from tests.commands import train

RECIPE = "miniature"


def run_seed(seed: int, runs: Path) -> Run:
    """The story with one seed; stages that neither tower nor sequel needs are left out."""
    folder = runs / f"seed{seed}"
    left_out = [f"~recipe.stages.{name}" for name in ("instruction_tuning", "mixed_preference")]
    arguments = [f"recipe={RECIPE}", f"seed={seed}", f"run_dir={folder}", "trainer.progress_bar=false", *left_out]
    result = train(*arguments, timeout=7200)
    if result.returncode:
        raise RuntimeError(f"seed {seed} failed:\n{result.stderr[-3000:]}")
    return read_run(folder)


def row(seed: int, run: Run) -> tuple[str, float | None]:
    """A line of the table, and the ratio."""
    carried, control = (score_curve(next(one for one in run.sequels if one.name == name)) for name in NAMES)
    goal, ratio = final_score(control), ratio_of(run)
    reached, own = first_reaching(carried, goal), first_reaching(control, goal)
    assert own is not None
    cells = [
        str(seed),
        f"{goal:.1%}",
        f"{own.tokens:,}",
        "never" if reached is None else f"{reached.tokens:,}",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{final_score(carried):.1%}",
    ]
    return f"| {' | '.join(cells)} |", ratio


NAMES = ("carried", "control")


def ratio_of(run: Run) -> float | None:
    carried, control = (next(one for one in run.sequels if one.name == name) for name in NAMES)
    return scaling_ratio(carried, control)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as pool:
        runs = options.runs or Path(place)
        found = list(pool.map(lambda seed: run_seed(seed, runs), options.seeds))
        rows = [row(seed, run) for seed, run in zip(options.seeds, found, strict=True)]
    print("| seed | control's final score | its tokens | carried: tokens until then | ratio | carried's final score |")
    print("|---|---|---|---|---|---|")
    print("\n".join(line for line, _ in rows))
    # A run that never gets there counts as infinitely long, not as absent.
    ratios = [float("inf") if ratio is None else ratio for _, ratio in rows]
    print(f"\nmedian ratio of {len(ratios)} seeds: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
