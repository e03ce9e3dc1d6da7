"""Settings of making preference pairs, `ivl-preferences`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ivl_lightning.config.check import ConfigError
from ivl_lightning.config.schema import DataConfig, ModelConfig, Strict

PairMethod = Literal["correctness", "dropout_ntp"]
PromptStyle = Literal["plain", "cot_en", "cot_zh"]
Judge = Literal["exact", "relaxed", "anls", "choice", "number"]


@dataclass(kw_only=True)
class PreferencesConfig(Strict):
    """What is asked, how it is answered, and which answers make pairs.

    Attributes:
        output: folder of the pairs; a command that was interrupted goes on there.
        model: the network that answers, read from `model.path`.
        data: conversations of one question and its answer; tiles and caps as in training.
        method: `correctness` pairs right with wrong answers; `dropout_ntp` pairs an answer with one that was finished
            without the image.
        prompt: `cot_en` and `cot_zh` ask for steps and a final answer, `plain` asks the question as it stands; null
            takes `cot_en` for `correctness` and `plain` for `dropout_ntp`.
        samples: answers to each question, for `correctness`.
        temperature: of sampling; 1 leaves the model's probabilities.
        top_k: only the k likeliest tokens are sampled; 0 allows all.
        top_p: only the likeliest tokens that make up this share are sampled.
        max_new_tokens: most tokens of an answer; one that is cut there counts as wrong.
        judge: how an answer is compared with the one in the data.
        judges: dataset -> its judge, where that is another one.
        max_pairs: most pairs of a question, for `correctness`.
        answers: `dropout_ntp` chooses the model's own answer, or the one in the data.
        start_ratio: share of the chosen answer's words that `dropout_ntp` keeps.
        seed: of sampling and of which pairs are drawn.
        batch_size: questions answered side by side.
        samples_per_batch: answers to a question sampled side by side; null samples all of them at once.
        device: `auto` takes CUDA where there is one.
        run_dir: run folder that groups such as `data=miniature` refer to.
        progress_bar: show one.
    """

    output: str
    model: ModelConfig
    data: DataConfig
    method: PairMethod = "correctness"
    prompt: PromptStyle | None = None
    samples: int = 32
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 2048
    judge: Judge = "exact"
    judges: dict[str, Judge] = field(default_factory=dict)
    max_pairs: int = 15
    answers: Literal["model", "data"] = "model"
    start_ratio: float = 0.5
    seed: int = 0
    batch_size: int = 4
    samples_per_batch: int | None = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: str = "runs/preferences"
    progress_bar: bool = True

    @property
    def prompt_style(self) -> PromptStyle:
        """How questions are asked."""
        return self.prompt or ("cot_en" if self.method == "correctness" else "plain")

    def judge_of(self, dataset: str) -> Judge:
        """How answers of a dataset are judged."""
        return self.judges.get(dataset, self.judge)


def check_preferences(config: PreferencesConfig) -> None:
    """Check the settings before anything is loaded.

    Raises:
        ConfigError: lists every one that is out of its range.
    """
    faults = [
        f"{name}={value} must be at least {least}"
        for name, value, least in (
            ("samples", config.samples, 1),
            ("top_k", config.top_k, 0),
            ("max_new_tokens", config.max_new_tokens, 1),
            ("max_pairs", config.max_pairs, 1),
            ("seed", config.seed, 0),
            ("batch_size", config.batch_size, 1),
            ("samples_per_batch", config.samples_per_batch, 1),
        )
        if value is not None and value < least
    ]
    if not config.temperature > 0.0:
        faults.append(f"temperature={config.temperature} must be above 0: at 0 all answers to a question are the same")
    if not 0.0 < config.top_p <= 1.0:
        faults.append(f"top_p={config.top_p} is a share above 0, 1 at most")
    if not 0.0 < config.start_ratio < 1.0:
        faults.append(f"start_ratio={config.start_ratio} is a share between 0 and 1")
    if faults:
        raise ConfigError("\n".join(faults))
