import socket
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mask2dit.curation.text import Box, TextDetector, subtitled

LINE = "We should have left before the rain."


def line(y, x=0.5, width=0.5, height=0.06):
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2, aspect=width / height * 16 / 9)


def test_a_line_that_stays_below_in_the_middle_is_a_subtitle():
    assert subtitled([[line(0.9)], [], [line(0.91, width=0.2)], [line(0.5), line(0.9)]]) == [True, False, True, True]


@pytest.mark.parametrize(
    "boxes",
    [
        [[line(0.9)], [line(0.8)], [line(0.72)]],  # moves
        [[line(0.3)], [line(0.3)], [line(0.3)]],  # lies above
        [[line(0.9, x=0.8)], [line(0.9, x=0.8)], [line(0.9, x=0.8)]],  # lies in a corner
        [[line(0.85, height=0.3)], [line(0.85, height=0.3)], [line(0.85, height=0.3)]],  # too large
        [[line(0.9)], [], []],  # shows once
    ],
)
def test_other_text_is_none(boxes):
    assert not any(subtitled(boxes))


@pytest.fixture(scope="module")
def detect():
    pytest.importorskip("rapidocr", reason="pip install mask2dit[curation]")
    return TextDetector()


def test_a_large_part_of_the_picture_is_no_text(detect, monkeypatch):
    sky = np.float32([[0, 0], [319, 0], [319, 120], [0, 120]])
    title = np.float32([[80, 60], [240, 60], [240, 100], [80, 100]])
    monkeypatch.setattr(detect, "detect", lambda image: SimpleNamespace(boxes=np.stack([sky, title])))
    text, _ = detect(np.zeros((1, 180, 320, 3), np.uint8))
    assert text == pytest.approx(160 * 40 / (180 * 320), rel=0.05)


@pytest.mark.slow
def test_subtitles_are_found_and_their_area_is_measured_without_the_network(detect, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", None)
    plain = np.full((180, 320, 3), (60, 90, 70), np.uint8)
    image = Image.fromarray(plain)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    pen.text((160, 165), LINE, font=font, fill="white", anchor="mm")
    left, top, right, bottom = pen.textbbox((160, 165), LINE, font=font, anchor="mm")
    area = (right - left) * (bottom - top) / (180 * 320)
    text, subtitles = detect(np.stack([np.asarray(image), plain, np.asarray(image)]))
    assert area < text < 2.5 * area and subtitles == pytest.approx(2 / 3, abs=1e-3)
    assert detect(np.stack([plain, plain])) == (0, 0)
