"""Progressive scaling: what a run with a carried vision tower saves against one whose tower starts afresh."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from ivl_lightning.checkpoints.lineage import has_trained_tower, tower_tokens
from ivl_lightning.reporting.logged_metrics import Series
from ivl_lightning.reporting.run_folder import Run, StageFolder
from ivl_lightning.reporting.scores import score_series

CONTROL = "control"
_TOKENS = "data/tokens/"
_SAME = 1e-6
"""Scores closer than this are equal: a mean over the same right answers differs in its last digits."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A validation.

    Attributes:
        tokens: that the run had trained on, over its stages.
        steps: optimizer steps, counted in the same way.
        score: mean over datasets, a share.
    """

    tokens: int
    steps: int
    score: float


@dataclass(frozen=True, slots=True)
class Begun:
    """Where a stage begins.

    Attributes:
        stage: its name.
        tokens: that the stages before it trained on.
    """

    stage: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Curve:
    """Scores of a run over its tokens; of the stages that train the vision tower or the projector alone.

    Attributes:
        name: of the run's folder.
        measured: its validations, oldest first.
        stages: where each stage begins.
        tokens: that it trained on in all.
        steps: the same of optimizer steps.
    """

    name: str
    measured: list[Measured]
    stages: list[Begun]
    tokens: int
    steps: int


@dataclass(frozen=True, slots=True)
class Row:
    """A sequel beside the control.

    Attributes:
        curve: its scores.
        tower: path that the vision tower was read from; None where it starts afresh.
        donor: whether the tower comes from a run beside another language model.
        tower_tokens: that had trained the tower before; None where they are not known.
        control: whether the others are compared with this one.
        reached: its first validation with the control's final score; None where there is none.
        share: tokens until then over the control's; None where either is missing.
    """

    curve: Curve
    tower: str | None
    donor: bool
    tower_tokens: int | None
    control: bool
    reached: Measured | None
    share: float | None


def scaling_ratio(carried: Run, control: Run) -> float | None:
    """Tokens until `carried` first reaches the control's final score, over the control's until it first does.

    Returns:
        None where `carried` never reaches it, or the control was not scored.
    """
    return _share(score_curve(carried), score_curve(control))


def compare(run: Run) -> list[Row]:
    """A row for each sequel with a score in a stage that trains the vision tower or the projector."""
    scored = [(sequel, curve) for sequel in run.sequels if (curve := score_curve(sequel)).measured]
    control = _control([sequel for sequel, _ in scored])
    against = next((curve for sequel, curve in scored if sequel is control), None)
    return [_row(sequel, curve, against) for sequel, curve in scored]


def score_curve(run: Run) -> Curve:
    """The scores of a run over its tokens; it has none where a stage did not log its tokens."""
    measured: list[Measured] = []
    begun: list[Begun] = []
    tokens = steps = 0
    stages = [stage for stage in run.stages if _trains_sight(stage)]
    for stage in stages:
        begun.append(Begun(stage.name, tokens))
        counts, length = _tokens(stage), stage.summary.steps
        for done, score in score_series(stage.metrics):
            measured.append(Measured(tokens + _at(counts, done), steps + done, score))
        tokens += _at(counts, length)
        steps += length
    counted = all(stage.metrics.names(_TOKENS) for stage in stages)
    return Curve(run.name, measured if counted else [], begun, tokens, steps)


def first_reaching(curve: Curve, score: float) -> Measured | None:
    """The first validation with this score or more; nothing is interpolated. None where there is none."""
    return next((one for one in curve.measured if one.score >= score - _SAME), None)


def final_score(curve: Curve) -> float:
    """The score of the last validation, a share."""
    return curve.measured[-1].score


def donor_path(run: Run) -> str | None:
    """Where the vision tower of a run was carried over from: by its lineage, else by its settings; None if nowhere."""
    lineages = [stage.lineage for stage in run.stages if stage.lineage is not None]
    paths = [origin.path for lineage in lineages for origin in lineage.origins if origin.donor]
    if paths:
        return paths[0]
    settings = [stage.config.get("scaling") or {} for stage in run.stages if stage.lineage is None]
    return next((one["donor"] for one in settings if one.get("donor")), None)


def _control(scored: list[Run]) -> Run | None:
    named = [sequel for sequel in scored if sequel.name == CONTROL]
    return next(iter([*named, *(sequel for sequel in scored if donor_path(sequel) is None)]), None)


def _row(sequel: Run, curve: Curve, control: Curve | None) -> Row:
    donor = donor_path(sequel)
    tower, trained = _tower(sequel)
    return Row(
        curve=curve,
        tower=tower or donor,
        donor=donor is not None,
        tower_tokens=trained,
        control=curve is control,
        reached=first_reaching(curve, final_score(control)) if control else None,
        share=_share(curve, control) if control else None,
    )


def _share(curve: Curve, control: Curve) -> float | None:
    if not control.measured:
        return None
    goal = final_score(control)
    reached, needed = first_reaching(curve, goal), first_reaching(control, goal)
    return reached.tokens / needed.tokens if reached and needed and needed.tokens else None


def _tower(run: Run) -> tuple[str | None, int | None]:
    """Where the tower of a run's first stage came from, if anything had trained it, and by how many tokens."""
    first = next((stage.lineage for stage in run.stages if _trains_sight(stage)), None)
    for origin in first.sources("vision") if first else []:
        if origin.lineage is None:
            return origin.path, None
        if has_trained_tower(origin.lineage):
            return origin.path, tower_tokens(origin.lineage)
    return None, None


def _trains_sight(stage: StageFolder) -> bool:
    parts = {part.partition(" ")[0] for part in stage.summary.trained}
    # A stage that is not finished may not say what it trains.
    return bool(parts & {"vision", "projector"}) if parts else stage.name != "language_warmup"


def _tokens(stage: StageFolder) -> Series:
    """Optimizer steps done, and tokens of all datasets until then."""
    by_step: dict[int, float] = {}
    for name in stage.metrics.names(_TOKENS):
        for step, tokens in stage.metrics.series(name):
            by_step[step] = by_step.get(step, 0.0) + tokens
    return sorted(by_step.items())


def _at(counts: Series, steps: int) -> int:
    """Tokens after so many steps; where they were not logged there, the count before in proportion to the steps."""
    if not counts:
        return 0
    before = bisect_right(counts, steps, key=lambda count: count[0])
    done, tokens = counts[max(before - 1, 0)]
    return round(tokens * steps / done)
