"""What was said and shown so far, as a row of the dataset format: what is encoded is what training would see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ivl_lightning.constants import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from ivl_lightning.structures import Record, Turn


@dataclass(frozen=True, slots=True)
class History:
    """A conversation; it grows by making a new one.

    Attributes:
        turns: human and gpt in turn.
        images: paths of all pictures, in the order of their `<image>`.
        video: path of the video, which a row has one of at most, and none beside pictures.
    """

    turns: tuple[Turn, ...] = ()
    images: tuple[str, ...] = ()
    video: str | None = None

    def showing(self, images: Sequence[str], video: str | None) -> History:
        """With more pictures, or a video.

        Raises:
            ValueError: a second video, or a video beside pictures.
        """
        if self.video is not None and video is not None:
            raise ValueError(f"{video}: this conversation has a video already, {self.video}: begin another one")
        film = self.video if video is None else video
        if film is not None and (self.images or images):
            raise ValueError(f"{film}: a conversation has pictures or a video, not both: begin another one")
        return replace(self, images=(*self.images, *images), video=film)

    def asked(self, text: str, images: Sequence[str] = (), video: str | None = None) -> History:
        """With one more question.

        Args:
            text: of the question. Where it has no placeholder for what is shown with it, one for each is put before
                it, each on a line of its own.
            images: shown with it.
            video: shown with it.

        Raises:
            ValueError: as `showing`.
        """
        if images and IMAGE_PLACEHOLDER not in text:
            text = f"{IMAGE_PLACEHOLDER}\n" * len(images) + text
        if video is not None and VIDEO_PLACEHOLDER not in text:
            text = f"{VIDEO_PLACEHOLDER}\n{text}"
        return replace(self.showing(images, video), turns=(*self.turns, Turn("human", text)))

    def answered(self, text: str) -> History:
        """With the answer to the last question."""
        return replace(self, turns=(*self.turns, Turn("gpt", text)))

    def record(self, system: str | None) -> Record:
        """The conversation as a row.

        Args:
            system: its system turn; None for that of the template.
        """
        spoken = (Turn("system", system), *self.turns) if system is not None else self.turns
        row: dict[str, object] = {"conversations": [{"from": turn.role, "value": turn.text} for turn in spoken]}
        if self.images:
            row["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        if self.video is not None:
            row["video"] = self.video
        return Record("chat", "conversation", len(self.turns), row)
