"""Writes docs/recipes/*.md, a page for each member of the family, from conf/: `python docs/generate_recipes.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hydra import compose, initialize_config_module

from ivl_lightning.config.schema import RunConfig
from ivl_lightning.constants import PREFERENCE_STAGE
from ivl_lightning.launch.compose import compose_stage, stage_names
from ivl_lightning.launch.outline import number, trained

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs/recipes"
RECIPES = ROOT / "conf/recipe"
DOMAINS = "domain"

Composed = Callable[[str], Mapping[str, RunConfig]]
"""Recipe -> its stages' configurations, in the order of the chain."""
Cell = tuple[str, tuple[str, ...]]
"""What a cell says, and the settings that it says it of."""


def pages(composed: Composed) -> Iterator[tuple[str, str]]:
    """Name and text of each page."""
    for path in sorted(RECIPES.glob("internvl*.yaml")):
        yield f"{path.stem}.md", "\n".join(_member(path.stem, composed))
    yield f"{DOMAINS}.md", "\n".join(_domains(composed))


def _member(name: str, composed: Composed) -> Iterator[str]:
    stages = composed(name)
    first = next(iter(stages.values()))
    title, notes = _remarks(RECIPES / f"{name}.yaml")
    yield from _head(title)
    parts = _remarks(ROOT / f"conf/model/{first.model.name}.yaml")[0].partition(": ")[2]
    yield f"{parts}: `model={first.model.name}`. {notes}".rstrip() + "\n"
    yield from _chain(name, stages)
    # 1.2-Plus is trained again as 1.2 is.
    again = [f"{kind}/{name.removesuffix('_plus')}" for kind in ("finetune", "lora")]
    again = [recipe for recipe in again if (RECIPES / f"{recipe}.yaml").is_file()]
    if again:
        yield "## Trained again on your data\n"
        yield from _table({recipe: _only(composed(recipe)) for recipe in again}, "recipe")
        yield from _commands(
            f"python train.py recipe={recipe} model.path=MODEL data.meta=META data.val_rows=200 trainer.devices=8"
            for recipe in again
        )


def _chain(name: str, stages: Mapping[str, RunConfig]) -> Iterator[str]:
    recipe = next(iter(stages.values())).recipe
    yield f"## The chain\n\n`recipe={name}`, {_source(recipe.source)}.\n"
    yield from _table(stages, "stage")
    if recipe.on_request:
        asked = ", ".join(f"`{stage}`" for stage in recipe.on_request)
        yield f"{asked} runs only where `stages` or `scaling.entry` names it.\n"
    start = "model.vision_path=VIT model.language_model_path=LLM"
    if recipe.donor is not None:
        yield f"The vision tower is that of [`{recipe.donor}`]({recipe.donor}.md) behind its stage 1.5:\n"
        start = f"model.language_model_path=LLM scaling.donor=runs/{recipe.donor}"
    learns_pairs = PREFERENCE_STAGE in stages
    pairs = f" stage_data.{PREFERENCE_STAGE}=PAIRS" if learns_pairs else ""
    last, data = ("mpo", "PAIRS") if learns_pairs else ("2", "META")
    yield from _commands(
        [
            f"python train.py recipe={name} {start} data.meta=META{pairs} dry_run=true",
            f"ivl-plan recipe={name} trainer.devices=8 trainer.num_nodes=16",
            f"python train.py recipe={name} stages=[{last}] model.path=MODEL data.meta={data} trainer.devices=8",
        ]
    )


def _domains(composed: Composed) -> Iterator[str]:
    names = [f"{DOMAINS}/{path.stem}" for path in sorted((RECIPES / DOMAINS).glob("*.yaml"))]
    columns = {name: _only(composed(name)) for name in names}
    yield from _head("Adaptation to a domain")
    source = _source(columns[names[0]].recipe.source)
    yield f"Mini-InternVL's: any small member of 2.0, trained in full on the data of one domain; {source}.\n"
    yield from _table(columns, "recipe")
    yield from _commands(
        f"python train.py model=internvl2_2b recipe={name} model.path=MODEL data.meta=META trainer.devices=8"
        for name in names
    )


def _only(stages: Mapping[str, RunConfig]) -> RunConfig:
    (config,) = stages.values()
    return config


def _head(title: str) -> Iterator[str]:
    yield f"# {title}\n"
    yield "<!-- Written by `python docs/generate_recipes.py` from conf/; do not edit. -->\n"
    yield (
        "[All recipes](../recipes.md) | [what the stages are](../stages.md) | [what it takes](../scale.md) | "
        "not repeated at full size with this code\n"
    )


def _table(columns: Mapping[str, RunConfig], kind: str) -> Iterator[str]:
    """Settings down, stages or recipes across; what no source gives has a star."""
    links = {name: f"[`{name}`](../stages/{name}.md)" if kind == "stage" else f"`{name}`" for name in columns}
    yield f"| | {' | '.join(links.values())} |"
    yield "|---" * (len(columns) + 1) + "|"
    starred = False
    for label, cell in ROWS.items():
        texts = [_starred(name, config, cell(config)) for name, config in columns.items()]
        if any(texts):
            yield f"| {label} | {' | '.join(texts)} |"
        starred |= any(text.endswith(" *") for text in texts)
    yield ""
    if starred:
        yield "\\* given by no source: that of the nearest member, or chosen so that packs fit.\n"


def _starred(name: str, config: RunConfig, cell: Cell) -> str:
    text, settings = cell
    chosen = config.recipe.chosen.get(config.stage.name, [])
    return f"{text} *" if text and any(setting in chosen for setting in settings) else text


def _trains(config: RunConfig) -> Cell:
    return trained(config), ("stage.trainable",)


def _length(config: RunConfig) -> Cell:
    steps, epochs = config.trainer.max_steps, config.trainer.max_epochs
    told = f"{steps:,} steps" if steps is not None else f"{epochs} epoch" + "s" * (epochs != 1)
    return told, ("trainer.max_steps", "trainer.max_epochs")


def _batch(config: RunConfig) -> Cell:
    data = config.data
    if config.stage.rows == "pairs":
        return f"{data.batch_pairs:,} pairs", ("data.batch_pairs",)
    if data.batch_samples is not None:
        return f"{data.batch_samples:,} conversations", ("data.batch_samples",)
    return f"{data.packs_per_step:,} packs", ("data.packs_per_step",)


def _packs(config: RunConfig) -> Cell:
    data = config.data
    told = f"{data.packs_per_step:,} of {data.max_tokens:,} tokens, {data.max_pack_tiles:,} tiles"
    return told, ("data.packs_per_step", "data.max_tokens", "data.max_pack_tiles")


def _longest(config: RunConfig) -> Cell:
    longest = config.data.max_sample_tokens or config.data.max_tokens
    return f"{longest:,} tokens", ("data.max_sample_tokens",)


def _rate(config: RunConfig) -> Cell:
    return number(config.optim.lr), ("optim.lr",)


def _warmup(config: RunConfig) -> Cell:
    steps, ratio = config.optim.warmup_steps, config.optim.warmup_ratio
    told = f"{ratio * 100:g} % of the steps" if steps is None else f"{steps:,} steps"
    return told, ("optim.warmup_steps", "optim.warmup_ratio")


def _loss(config: RunConfig) -> Cell:
    if config.stage.rows == "pairs":
        parts = config.preference.parts
        told = " + ".join(f"{part['weight']:g} {name}" for name, part in parts.items() if part is not None)
        return f"{told}, beta {config.preference.beta:g}", ()
    return f"next token, {config.loss.reduction}", ("loss.reduction",)


def _gpus(config: RunConfig) -> Cell:
    gpus = config.recipe.gpus.get(config.stage.name)
    return "" if gpus is None else f"{gpus:,}", ()


def _own_source(config: RunConfig) -> Cell:
    own = config.recipe.sources.get(config.stage.name)
    return "" if own is None else _source(own), ()


ROWS: dict[str, Callable[[RunConfig], Cell]] = {
    "trains": _trains,
    "length": _length,
    "batch of a step": _batch,
    "packs of a step": _packs,
    "longest sample": _longest,
    "tiles of a picture": lambda config: (f"{config.data.max_tiles}", ("data.max_tiles",)),
    "learning rate": _rate,
    "warm-up": _warmup,
    "weight decay": lambda config: (number(config.optim.weight_decay), ("optim.weight_decay",)),
    "drop path": lambda config: (f"{config.stage.drop_path_rate:g}", ("stage.drop_path_rate",)),
    "loss": _loss,
    "GPUs of the published run": _gpus,
    "source of this stage": _own_source,
}


def _commands(lines: Sequence[str] | Iterator[str]) -> Iterator[str]:
    yield "\n".join(["```", *(_folded(line) for line in lines), "```"]) + "\n"


def _folded(command: str, width: int = 116) -> str:
    """A long command over several lines, as a shell takes it."""
    lines = [""]
    for word in command.split():
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("   ")
        lines[-1] = f"{lines[-1]} {word}".lstrip() if len(lines) == 1 else f"{lines[-1]} {word}"
    return " \\\n".join(lines)


def _source(text: str) -> str:
    kind, _, place = text.partition(": ")
    return f"{kind} `{place}` of OpenGVLab/InternVL" if kind == "script" else text


def _remarks(path: Path) -> tuple[str, str]:
    """First sentence and the others of the remarks that a file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    remarks = []
    for line in lines[lines[0].startswith("# @") :]:
        if not line.startswith("# "):
            break
        remarks.append(line.removeprefix("# "))
    first, stop, rest = " ".join(remarks).partition(". ")
    return (first if stop else first.removesuffix(".")), rest


def composed_recipe(recipe: str) -> dict[str, RunConfig]:
    """A recipe's stages as `train.py` composes them; within a Hydra context."""
    arguments = [f"recipe={recipe}", "data.meta=META"]
    own = compose("train", overrides=arguments).recipe
    return {
        stage: compose_stage(stage, arguments, run_dir="RUN", recipe=own)
        for stage in stage_names(None, list(own.stages))
    }


if __name__ == "__main__":
    TARGET.mkdir(exist_ok=True)
    with initialize_config_module("ivl_lightning.conf", version_base="1.3"):
        for page, text in pages(composed_recipe):
            (TARGET / page).write_text(text, encoding="utf-8")
