"""Stage 2 of InternVL 2.5, full instruction tuning: everything trains on high-quality conversations."""

from ivl_lightning.stages.supervised import SupervisedStage


class InstructionTuning(SupervisedStage):
    """Stage 2 of InternVL 2.5, full instruction tuning: everything trains on high-quality conversations."""

    default_trainable = ("vision", "projector", "llm")
