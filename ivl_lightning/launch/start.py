"""What a chain needs to start from, in the words that the chain and its dry run share."""

from __future__ import annotations

HOW_TO_START = (
    "give model.path=FOLDER or init_from=RUN, or parts (model.vision_path and model.language_model_path) "
    "(or model.random_weights=true to train from nothing)"
)


def how_to_give_tower(known: str | None) -> str:
    """What to do where there is no vision tower.

    Args:
        known: recipe whose run gives it; None where nobody says.
    """
    which = f" (a run of recipe={known}, from whose stage 1.5 the published model has it)" if known else ""
    return f"give scaling.donor=RUN{which}, or model.vision_path=FOLDER"
