"""SentencePiece model files: read, changed where added tokens take over pieces, written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

SENTENCEPIECE_FILE = "tokenizer.model"


def read_model(file: Path) -> Any:
    """Contents of a SentencePiece model file, as its protobuf message."""
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    model.ParseFromString(file.read_bytes())
    return model


def claim_pieces(model: Any, claims: Mapping[int, str]) -> bool:
    """Put added tokens in the place of the pieces whose ids they have.

    InternLM2's model file ends in placeholders, whose ids its releases give to the chat markers. A text that spells
    such a placeholder out no longer becomes the marker.

    Args:
        model: as `read_model` returns it; changed in place.
        claims: id and content of added tokens; those behind the model's last piece are left alone.

    Returns:
        Whether anything was changed.
    """
    changed = False
    for number, content in claims.items():
        piece = model.pieces[number] if 0 <= number < len(model.pieces) else None
        # Without its bytes and its unknown piece a model cannot spell every text.
        if piece is None or piece.piece == content or piece.type in (piece.BYTE, piece.UNKNOWN):
            continue
        piece.piece, piece.type = content, piece.CONTROL
        changed = True
    return changed


def user_defined_pieces(model: Any) -> list[str]:
    """Pieces that SentencePiece never splits and never joins to their neighbors."""
    return [piece.piece for piece in model.pieces if piece.type == piece.USER_DEFINED]


def copy_with_model(folder: Path, target: Path, model: Any) -> None:
    """Fill an empty folder with links to a tokenizer's files and with another model in place of its own."""
    for file in folder.absolute().iterdir():
        if file.name != SENTENCEPIECE_FILE:
            (target / file.name).symlink_to(file)
    (target / SENTENCEPIECE_FILE).write_bytes(model.SerializeToString())
