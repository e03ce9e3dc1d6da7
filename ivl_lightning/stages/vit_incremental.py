"""Stage 1.5 of InternVL 2.5, ViT incremental learning: tower and projector train beside a small LLM."""

from ivl_lightning.stages.supervised import SupervisedStage


class ViTIncremental(SupervisedStage):
    """Stage 1.5 of InternVL 2.5, ViT incremental learning: tower and projector train beside a small LLM."""

    default_trainable = ("vision", "projector")
