"""What is kept of a picture or clip is what the model sees of its file, in every turn."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from examples.demo.media import draw_scene, write_video
from qwen2vl import MediaError, MediaWarning
from qwen2vl.web.attachments import Upload, keep_notes, read_attachment


def asked(processor, *items, **options):
    return processor([{"role": "user", "content": [*items, {"type": "text", "text": "What?"}]}], **options)


def animation(form: str, count: int = 4) -> bytes:
    frames = [draw_scene(90, 60).rotate(20 * n) for n in range(count)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=100)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"max_pixels": 4000, "video_max_pixels": 4000, "fps": 3.0}])
@pytest.mark.parametrize("file", ["picture.png", "photo.jpg", "clip.mp4", "clip.gif", "clip.webp"])
def test_later_turns_see_the_pixels_of_the_file(file, options, processor, tmp_path):
    """Bit for bit, whatever the limits made of it, and told by its content whether it is a clip."""
    path = tmp_path / file
    if file == "clip.mp4":
        write_video(path, width=90, height=60, seconds=2, fps=5)
    elif file.startswith("clip"):
        path.write_bytes(animation(path.suffix[1:]))
    else:
        draw_scene(90, 61).save(path)
    kind = "video" if file.startswith("clip") else "image"
    whole = asked(processor, {"type": kind, kind: path.read_bytes()}, **options)
    with path.open("rb") as opened:
        kept = read_attachment(processor, opened, file, options)
    assert kept.info.kind == kind and kept.item["type"] == kind
    assert kept.info.num_tokens == whole.media[0].num_tokens
    again = asked(processor, kept.item, **options)
    assert again.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name
    facts = kept.facts()
    assert facts["source_size"] == ((90, 61) if kind == "image" else (90, 60))
    assert facts["grid"] == whole.media[0].grid_thw and facts["patches"] == np.prod(facts["grid"])
    width, height = Image.open(io.BytesIO(kept.picture)).size
    assert (width, height) == facts["resized_size"]
    assert Image.open(io.BytesIO(kept.parts)).width > width


def test_a_moving_picture_of_one_frame_is_a_picture_and_a_name_is_no_content(processor):
    for form in ("GIF", "WEBP"):
        kept = read_attachment(processor, io.BytesIO(animation(form, 1)), "still", {}, clip=True)
        assert kept.info.kind == "image"
    for clip, message in ((False, "'notes.mp4' is not an image in a supported format"), (True, "notes.mp4")):
        with Upload("notes.mp4") as file, pytest.raises(MediaError, match=message):
            file.write(b"no clip at all, whatever it is called")
            read_attachment(processor, file, "notes.mp4", {}, clip=clip)


def test_what_is_told_while_a_file_is_read_is_its_note(processor, tmp_path):
    write_video(tmp_path / "cut.mkv", width=64, height=48, seconds=2, fps=5)
    whole = (tmp_path / "cut.mkv").read_bytes()
    with pytest.warns(MediaWarning, match="ends early"), warnings.catch_warnings():
        warnings.simplefilter("default")  # as Python begins: the same warning is told once
        with keep_notes():
            for _ in range(2):
                kept = read_attachment(processor, io.BytesIO(whole[: len(whole) * 3 // 4]), "cut.mkv", {})
                assert len(kept.notes) == 1 and "ends early" in kept.notes[0]
            assert not read_attachment(processor, io.BytesIO(whole), "cut.mkv", {}).notes


def test_an_upload_is_a_file_without_a_name_that_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Upload("large.png") as file:
        file.write(b"x" * (9 << 20))  # more than is held in memory
        assert file.fileno() >= 0 and list(tmp_path.iterdir()) == [] and file.name == "large.png"
    assert list(tmp_path.iterdir()) == []
