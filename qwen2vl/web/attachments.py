"""Pictures and clips of a conversation, kept as the pixels that the model sees.

A file is read once, as it comes, and not kept: what every turn shows the model again are its pixels after resizing.
:func:`qwen2vl.media.inspection.patches_to_frames` takes them back out of the patches, so each turn sees them unchanged.
"""

from __future__ import annotations

import io
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import MediaWarning

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..media.options import PatchShape
    from ..prompt.inputs import MediaInfo
    from ..prompt.processor import Processor

_IN_MEMORY = 8 << 20  # bytes of an upload that are not written to a file
_reading = threading.local()  # .notes: what is told in this thread while it reads a file


@contextmanager
def keep_notes() -> Iterator[None]:
    """Inside, each MediaWarning about a file is a note of its attachment, and told as before. Filters of warnings
    belong to the whole process, so it is entered once, before threads read."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", MediaWarning)  # a file that is given again, too
        show = warnings.showwarning

        def keep(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if issubclass(category, MediaWarning) and (notes := getattr(_reading, "notes", None)) is not None:
                notes.append(str(message))
            show(message, category, *where, **more)

        warnings.showwarning = keep
        yield


class Upload(tempfile.SpooledTemporaryFile):
    """The bytes of a file that a browser sends, named as the browser names it.

    They are in memory, or in a file without a name in any folder: it goes with this object and with the process.
    """

    def __init__(self, name: str) -> None:
        super().__init__(max_size=_IN_MEMORY)
        self._called = name

    @property
    def name(self) -> str:
        """For messages about the file."""
        return self._called


@dataclass(frozen=True, eq=False)
class Attachment:
    """One picture or clip.

    Attributes:
        name: of the file, as it was given.
        info: what it became; sizes are (height, width).
        frames: (frames, height, width, 3) uint8, as the model sees them; one for a picture.
        shape: how the checkpoint cuts them into patches.
        notes: what was told while it was read, that it ends early say.
    """

    name: str
    info: MediaInfo
    frames: np.ndarray
    shape: PatchShape
    notes: tuple[str, ...] = ()

    @property
    def item(self) -> dict[str, Any]:
        """It in a message. Both limits of its area are its own, so that nothing resizes it again."""
        area = self.frames.shape[1] * self.frames.shape[2]
        source = self.frames[0] if self.info.kind == "image" else list(self.frames)
        return {"type": self.info.kind, self.info.kind: source, "min_pixels": area, "max_pixels": area}

    def facts(self) -> dict[str, Any]:
        """For the page; sizes are (width, height), times in seconds."""
        info, shape = self.info, self.shape
        facts = {
            "name": self.name,
            "kind": info.kind,
            "source_size": info.source_size[::-1],
            "resized_size": info.resized_size[::-1],
            "grid": info.grid_thw,
            "patches": info.grid_thw[0] * info.grid_thw[1] * info.grid_thw[2],
            "patch_size": shape.patch_size,
            "tokens": info.num_tokens,
            "notes": self.notes,
        }
        if info.kind == "video":
            facts |= {"duration": info.duration, "fps": info.native_fps, "frame_times": info.frame_times}
        return facts

    @cached_property
    def picture(self) -> bytes:
        """The picture, or the clip's first frame, as a PNG."""
        from PIL import Image

        return _png(Image.fromarray(self.frames[0]))

    @cached_property
    def parts(self) -> bytes:
        """A PNG of the picture under the grid of its patches and tokens, or of all frames that the model sees."""
        from ..media.inspection import draw_contact_sheet, draw_patch_grid

        info, shape = self.info, self.shape
        if info.kind == "image":
            return _png(draw_patch_grid(self.frames[0], patch_size=shape.patch_size, merge_size=shape.merge_size))
        times = info.frame_times + info.frame_times[-1:] * (len(self.frames) - len(info.frame_times))
        tokens = info.num_tokens // info.grid_thw[0]
        step = shape.temporal_patch_size
        return _png(draw_contact_sheet(self.frames, times, tokens_per_step=tokens, temporal_patch_size=step))


def read_attachment(
    processor: Processor, file: BinaryIO, name: str, options: dict[str, Any], *, clip: bool = False
) -> Attachment:
    """Read a file from its beginning.

    Args:
        options: of the processor.
        clip: take what is of no known format for a clip, and not for a picture. Animated GIF and WebP are clips.

    Raises:
        MediaError: it is no picture or clip, damaged, or more than the processor's limits allow.
    """
    from ..media.inspection import patches_to_frames

    kind = "video" if _is_clip(file, name, processor, clip) else "image"
    notes: list[str] = []
    _reading.notes = notes
    try:
        inputs = processor([{"role": "user", "content": [{"type": kind, kind: file}]}], **options)
    finally:
        _reading.notes = None
    (info,) = inputs.media
    frames = patches_to_frames(
        inputs["pixel_values" if kind == "image" else "pixel_values_videos"].numpy(),
        info.grid_thw,
        patch_size=processor.shape.patch_size,
        merge_size=processor.shape.merge_size,
    )
    return Attachment(name, info, frames, processor.shape, tuple(notes))


def _is_clip(file: BinaryIO, name: str, processor: Processor, otherwise: bool) -> bool:
    from ..media.image import count_frames, open_image
    from ..media.kinds import picture_format, video_container

    file.seek(0)
    head = file.read(200)
    file.seek(0)
    if head[:4] == b"GIF8" or picture_format(head) == "WEBP":
        with open_image(file, repr(name), processor.access.limits) as image:
            several = count_frames(image) > 1
        file.seek(0)
        return several
    if picture_format(head) is not None:
        return False
    return otherwise or video_container(head) is not None


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # it is sent once or twice, and mostly to this machine
    return file.getvalue()
