"""Trains the language model alone, on text. Only the miniature needs it: it stands for the pretrained LLM."""

from ivl_lightning.stages.supervised import SupervisedStage


class LanguageWarmup(SupervisedStage):
    """Trains the language model alone, on text. Only the miniature needs it: it stands for the pretrained LLM."""

    default_trainable = ("llm",)
