"""The prompt as text, as the released template writes it: one placeholder for each image or video."""

from collections.abc import Sequence

from qwen2vl.prompt.chatml import Media, Segment, Text


def segments_to_text(segments: Sequence[Segment]) -> str:
    """Text as it is, control tokens and placeholders by name."""
    return "".join(
        segment.text if isinstance(segment, Text) else segment.pad if isinstance(segment, Media) else segment.name
        for segment in segments
    )
