"""Stage 1 of InternVL 2.5, MLP warm-up: the projector alone learns to speak to the language model."""

from ivl_lightning.stages.supervised import SupervisedStage


class MLPWarmup(SupervisedStage):
    """Stage 1 of InternVL 2.5, MLP warm-up: the projector alone learns to speak to the language model."""

    default_trainable = ("projector",)
