"""Stage 1.5 of InternVL 2.5, ViT incremental learning: vision tower and projector train beside a small language model."""

from ivl_lightning.stages.supervised import SupervisedStage


class ViTIncremental(SupervisedStage):
    """Stage 1.5 of InternVL 2.5, ViT incremental learning: vision tower and projector train beside a small language model."""

    default_trainable = ("vision", "projector")
