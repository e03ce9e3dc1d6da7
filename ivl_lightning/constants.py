"""Numbers and names that every room shares. Sources: InternVL `constants.py`, `dataset.py`, `conversation.py`."""

IGNORE_INDEX = -100
"""Label of a position that is not trained."""

TILE_SIZE = 448
"""Side of a tile in pixels."""

PATCH_SIZE = 14
"""Side of a ViT patch in pixels."""

DOWNSAMPLE_RATIO = 0.5
"""Pixel unshuffle: the side of the token grid over the side of the patch grid."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

IMAGE_START_TOKEN = "<img>"
IMAGE_END_TOKEN = "</img>"
IMAGE_CONTEXT_TOKEN = "<IMG_CONTEXT>"

SPECIAL_TOKENS = (
    IMAGE_START_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_CONTEXT_TOKEN,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
"""The nine tokens added to every language model's tokenizer, in the official order."""

RESERVED_TOKENS = (IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_CONTEXT_TOKEN)
"""Tokens that the trainer writes itself; in a user's text they would forge an image slot."""

WEIGHTS_FOLDER = "weights"
"""Where a stage leaves its weights, below its folder."""

CHECKPOINTS_FOLDER = "checkpoints"
"""Where it keeps what it goes on from, if it is killed."""

DONE_NAME = "done.json"
"""What marks a stage's folder as finished."""

METRICS_NAME = "metrics.jsonl"
"""What a stage has logged, in its folder."""

TILE_CURVE_NAME = "tile_curve.json"
"""Where a stage writes what its model scores at several tile limits, in its folder."""

PREEMPTED_EXIT_CODE = 75
"""Of a run that has saved and stopped on request: EX_TEMPFAIL of sysexits.h, "try again later"."""

TOWER_STAGE = "vit_incremental"
"""The stage whose vision tower other language models take over."""

PREFERENCE_STAGE = "mixed_preference"
STAGES = ("language_warmup", "mlp_warmup", TOWER_STAGE, "instruction_tuning", PREFERENCE_STAGE)
"""Stages in the order of a chain."""

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
