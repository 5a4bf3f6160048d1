"""Handling of video files: choosing, reading and resizing frames, and writing.

Video is `uint8 (F, H, W, 3)` in files and readers, and `float32 (F, 3, H, W)` in [-1, 1] as input of a model.
"""

from mask2dit.video.frames import choose_frames, frame_stride, resize_and_crop, to_uint8
from mask2dit.video.reading import (
    ArrayReader,
    FileReader,
    RangeReader,
    VideoReader,
    choose_scene,
    open_video,
    read_scene,
)
from mask2dit.video.writing import contact_sheet, join_videos, write_clips, write_image, write_video

__all__ = [
    "ArrayReader",
    "FileReader",
    "RangeReader",
    "VideoReader",
    "choose_frames",
    "choose_scene",
    "contact_sheet",
    "frame_stride",
    "join_videos",
    "open_video",
    "read_scene",
    "resize_and_crop",
    "to_uint8",
    "write_clips",
    "write_image",
    "write_video",
]
