"""Atomic writing of videos and images, and contact sheets that show a story at a glance."""

import math
import os
import subprocess
import tempfile
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mask2dit.files import atomic_path, write_errors

CRF = 17  # x264's constant rate factor; visually lossless


def write_image(path: str | os.PathLike, image: Image.Image) -> None:
    """Write `image` as PNG, atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float, full_chroma: bool = False) -> None:
    """Write an H.264 mp4 (BT.709), atomically. Frames are encoded as they arrive, without collecting them.

    Args:
        path: a path that ends in `.mp4`.
        frames: `uint8 (H, W, 3)` each, or an array `(F, H, W, 3)`; H and W even.
        fps: frames per second.
        full_chroma: keep colour at every pixel (yuv444p), as small frames need; not every player supports this. Otherwise,
            colour is kept at every fourth pixel (yuv420p).

    Raises:
        ValueError: if `path` is not an mp4, `fps` is not positive, there is no frame, or a frame is of another type,
            shape or size.
        OSError: if ffmpeg fails, as on a full disk; the message includes ffmpeg's output.
    """
    path = Path(path)
    _check_target(path, fps)
    frames = iter(frames)
    try:
        first = np.asarray(next(frames))
    except StopIteration:
        raise ValueError(f"there are no frames to write to {path}") from None
    _check_frame(first)
    with atomic_path(path) as temporary:
        temporary = temporary.absolute()  # ffmpeg would take a folder with a colon in its name for a protocol
        sent, message = _encode(chain([first], frames), first.shape, fps, full_chroma, [str(temporary)], path)
        written = _count_frames(temporary)
        if written != sent:
            raise OSError(f"ffmpeg wrote {written} of {sent} frames to {path}: {message or 'no message'}")


def write_clips(
    paths: Sequence[str | os.PathLike], clips: Sequence[np.ndarray], fps: float, full_chroma: bool = False
) -> None:
    """Write many small videos like `write_video`, but with a single ffmpeg, which takes longer to start than to encode.

    Args:
        paths: paths of the videos, all in one folder.
        clips: `uint8 (F, H, W, 3)` each, all of one shape.
        fps, full_chroma: as in `write_video`.

    Raises:
        ValueError: if the numbers of paths and clips differ, or as `write_video` raises it.
        OSError: if ffmpeg fails; then none of the videos is written.
    """
    paths, shapes = [Path(path) for path in paths], {np.asarray(clip).shape for clip in clips}
    if len(paths) != len(clips) or not paths:
        raise ValueError(f"each clip needs a path, but there are {len(paths)} paths for {len(clips)} clips")
    if len(shapes) > 1 or len({path.parent for path in paths}) > 1:
        raise ValueError("clips that are written together need one shape and one folder")
    for path in paths:
        _check_target(path, fps)
    length = len(clips[0])
    if not length:
        raise ValueError(f"there are no frames to write to {paths[0]}")
    _check_frame(clips[0][0])
    folder = paths[0].parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {paths[0]}: folder {folder} does not exist; create it first")
    with write_errors(paths[0]), tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        names, table = str(Path(temporary).absolute() / "%06d.mp4"), Path(temporary) / "segments.csv"
        # Each clip begins with a key frame and is a separate segment. B-frames, which wait for later frames, would shift the
        # times by which the segments are counted.
        output = [
            "-bf",
            "0",
            "-force_key_frames",
            f"expr:eq(mod(n,{length}),0)",
            "-f",
            "segment",
            "-segment_format",
            "mp4",
        ]
        if len(clips) > 1:
            output += ["-segment_frames", ",".join(str(length * k) for k in range(1, len(clips)))]
        output += [
            "-reset_timestamps",
            "1",
            "-segment_list",
            str(table.absolute()),
            "-segment_list_type",
            "csv",
            names,
        ]
        _, message = _encode(chain.from_iterable(clips), clips[0][0].shape, fps, full_chroma, output, paths[0])
        spans = [line.split(",") for line in table.read_text().splitlines()]
        lengths = [round((float(end) - float(start)) * fps) for _, start, end in spans]
        if lengths != [length] * len(clips):
            whole = lengths.count(length)
            raise OSError(f"ffmpeg wrote {whole} of {len(clips)} clips whole to {folder}: {message or 'no message'}")
        for (name, *_), path in zip(spans, paths):
            os.replace(Path(temporary) / name, path)


def join_videos(path: str | os.PathLike, clips: Sequence[str | os.PathLike]) -> None:
    """Join videos that `write_video` wrote with one size and frame rate, atomically and without encoding them again: each
    frame of the result decodes to the pixels of the same frame of its clip.

    Args:
        path: a path that ends in `.mp4`.
        clips: the videos, in order.

    Raises:
        ValueError: if there are no clips, or one cannot be read or has another size, frame rate or pixel format.
        OSError: if the disk is full; the message names `path`.
    """
    import av  # imported here, since most of the package writes no video

    parts = [_read_packets(Path(clip)) for clip in clips]
    if not parts:
        raise ValueError(f"there are no clips to join to {path}")
    for clip, (_, form, _) in zip(clips, parts):
        if form != parts[0][1]:
            raise ValueError(f"{clip} is {form}, but {clips[0]} is {parts[0][1]}: they cannot be joined")
    # Players decode some frames early. Short clips have no such delay, so that the times of decoding are set anew.
    delay = max(packets[0].pts - packets[0].dts for packets, _, _ in parts)
    offset = 0
    with atomic_path(path) as temporary, av.open(str(temporary), "w") as output:
        with av.open(str(clips[0])) as first:
            stream = output.add_stream_from_template(first.streams.video[0])
        stream.time_base = parts[0][2]
        for packets, _, _ in parts:
            length = packets[0].duration
            for number, packet in enumerate(packets):
                packet.pts += offset
                packet.dts = offset + number * length - delay
                packet.stream = stream
                output.mux(packet)
            offset += len(packets) * length


def _read_packets(path: Path) -> tuple[list, str, Fraction]:
    """Reads the packets of a video in the order of decoding, what has to be equal where videos are joined, and the unit of
    the packets' times. Raises `ValueError` for a file that is not a video."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.dts is not None]
            codec = stream.codec_context
            form = f"{codec.width}x{codec.height} {codec.pix_fmt} at {stream.average_rate} frames per second"
            return packets, form, stream.time_base
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a video ({error})") from error


def _check_target(path: Path, fps: float) -> None:
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"a video is written as .mp4, but the path is {path}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be positive, but got {fps}")


def _check_frame(frame: np.ndarray) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
        raise ValueError(f"a frame must be uint8 (H, W, 3), but got {frame.dtype} {frame.shape}")
    height, width = frame.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(
            f"frames are {height}x{width} (height x width), but H.264 needs even sizes; crop to "
            f"{height - height % 2}x{width - width % 2}"
        )


def _count_frames(path: Path) -> int:
    from imageio_ffmpeg import count_frames_and_secs

    return count_frames_and_secs(path)[0]


def _encode(
    frames: Iterator[np.ndarray],
    shape: tuple[int, int, int],
    fps: float,
    full_chroma: bool,
    output: list[str],
    path: Path,
) -> tuple[int, str]:
    """Pipe `frames` through ffmpeg, whose command line ends with `output`; errors name `path`.

    Returns:
        The number of frames sent, and ffmpeg's messages.
    """
    # Imported here, since most of the package writes no video. Only the binary and the frame count of imageio_ffmpeg are
    # used: its own writer ignores ffmpeg's exit status, and so reports success for half a file on a full disk.
    from imageio_ffmpeg import get_ffmpeg_exe

    height, width = shape[:2]
    command = [get_ffmpeg_exe(), "-v", "error", "-y"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-", "-an"]
    # By default, ffmpeg converts RGB by BT.601 without tagging it; players then guess by size, and large videos change
    # colour. The tags are set on the frames, since the encoder prefers those to its own options.
    tags = "colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    command += ["-vf", f"scale=out_color_matrix=bt709:out_range=tv,setparams={tags}"]
    command += ["-c:v", "libx264", "-crf", str(CRF), "-pix_fmt", "yuv444p" if full_chroma else "yuv420p", *output]

    sent = 0
    # A file instead of a pipe: nothing reads it while frames are sent, and a full pipe would block ffmpeg forever.
    with tempfile.TemporaryFile() as log:
        # A separate session, so that Ctrl-C reaches only this process, which then stops ffmpeg.
        ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            for frame in frames:
                frame = np.asarray(frame)
                if frame.dtype != np.uint8 or frame.shape != shape:
                    raise ValueError(
                        f"frame {sent} is {frame.dtype} {frame.shape}, but frame 0 was uint8 {(height, width, 3)}"
                    )
                sent += 1
                try:
                    ffmpeg.stdin.write(np.ascontiguousarray(frame))
                except BrokenPipeError:
                    break  # ffmpeg has exited; its status or the frame count shows why
            with suppress(BrokenPipeError):
                ffmpeg.stdin.close()
            ffmpeg.wait()
        except BaseException:
            ffmpeg.kill()
            with suppress(BrokenPipeError):
                ffmpeg.stdin.close()
            ffmpeg.wait()
            raise
        log.seek(0)
        message = "; ".join(log.read().decode(errors="replace").split("\n")).strip("; ")

    if ffmpeg.returncode != 0:
        raise OSError(f"ffmpeg failed to write {path} (exit status {ffmpeg.returncode}): {message or 'no message'}")
    return sent, message


# Layout of a contact sheet: sizes in pixels, colours as RGB.
MARGIN = 24
GAP = 8
TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE = 24, 18, 15
BACKGROUND, INK, SOFT_INK = (250, 250, 248), (32, 33, 36), (95, 99, 104)
CAPTION_LINES = 2


def contact_sheet(
    scenes: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int = 6,
    thumb_width: int = 240,
    title: str | None = None,
    given: Collection[int] = (),
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """A story at a glance: one row per scene, with evenly spaced frames from its first to its last.

    Text is drawn in Pillow's default font, which has Latin letters only; others appear as boxes.

    Args:
        scenes: `uint8 (F, H, W, 3)` each; they may differ in length and size.
        captions: one per scene, drawn above its row and cut to two lines.
        columns: maximum number of frames per row.
        thumb_width: width of a frame on the sheet in pixels; small frames are enlarged to it.
        title: a line at the top.
        given: indices of scenes that were given instead of generated, which are marked.
        labels: one per row, instead of "Scene 1", ….

    Raises:
        ValueError: if there is no scene, a scene is not uint8 (F, H, W, 3), the numbers of captions and scenes
            differ, or `columns` is less than 2.
    """
    if not scenes:
        raise ValueError("a contact sheet needs at least one scene")
    if columns < 2:
        raise ValueError(f"columns must be at least 2, for the first and the last frame, but got {columns}")
    if captions is not None and len(captions) != len(scenes):
        raise ValueError(f"there are {len(captions)} captions for {len(scenes)} scenes; give one for each")

    rows = [_thumbnails(scene, columns, thumb_width, k) for k, scene in enumerate(scenes, start=1)]
    inner_width = max(len(row) for row in rows) * (thumb_width + GAP) - GAP

    # Everything to draw, with its vertical position, from top to bottom.
    title_font, label_font, caption_font = (
        ImageFont.load_default(size) for size in (TITLE_SIZE, LABEL_SIZE, CAPTION_SIZE)
    )
    texts: list[tuple[int, str, ImageFont.FreeTypeFont, tuple[int, int, int]]] = []
    images: list[tuple[int, int, Image.Image]] = []
    y = MARGIN
    if title:
        texts.append((y, _wrap(title, title_font, inner_width, 1)[0], title_font, INK))
        y += TITLE_SIZE + MARGIN
    for k, row in enumerate(rows):
        label = labels[k] if labels else f"Scene {k + 1} (given)" if k in given else f"Scene {k + 1}"
        texts.append((y, label, label_font, INK))
        y += LABEL_SIZE + GAP
        if captions is not None and captions[k].strip():
            for line in _wrap(captions[k], caption_font, inner_width, CAPTION_LINES):
                texts.append((y, line, caption_font, SOFT_INK))
                y += CAPTION_SIZE + GAP // 2
            y += GAP // 2
        y += GAP // 2
        images += [(y, MARGIN + column * (thumb_width + GAP), image) for column, image in enumerate(row)]
        y += row[0].height + MARGIN

    sheet = Image.new("RGB", (inner_width + 2 * MARGIN, y), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for top, text, font, colour in texts:
        draw.text((MARGIN, top), text, font=font, fill=colour)
    for top, left, image in images:
        sheet.paste(image, (left, top))
    return sheet


def _thumbnails(scene: np.ndarray, columns: int, width: int, number: int) -> list[Image.Image]:
    if scene.dtype != np.uint8 or scene.ndim != 4 or scene.shape[-1] != 3 or scene.size == 0:
        raise ValueError(f"scene {number} must be uint8 (F, H, W, 3) and not empty, got {scene.dtype} {scene.shape}")
    indices = np.linspace(0, len(scene) - 1, min(columns, len(scene))).round().astype(int)
    height = max(1, round(width * scene.shape[1] / scene.shape[2]))
    return [Image.fromarray(scene[index]).resize((width, height), Image.Resampling.LANCZOS) for index in indices]


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines, each at most `width` pixels wide; an ellipsis replaces text that is cut."""
    # Pillow's default font has neither dashes nor accents.
    text = unicodedata.normalize("NFKD", text.replace("–", "-").replace("—", "-"))
    text = "".join(character for character in text if not unicodedata.combining(character))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], f"{lines[max_lines - 1]} {lines[max_lines]}"]
    return [_shorten(line, font, width) for line in lines]


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"
