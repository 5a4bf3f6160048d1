"""The index of a video file: the frames that it shows, and the key frames from which they decode exactly.

A file is indexed in one of two ways. `index_packets` reads the compressed packets without decoding them. It is used if each
packet is proven to be one frame with its own presentation time. `index_frames` decodes the whole file once. It works for
every file, but finds no key frames to start from, so that frames are always decoded in order from the first.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, dropwhile, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Containers that store a presentation time with each frame. AVI and MPEG program streams do not; FFmpeg guesses it.
TIMED_CONTAINERS = {"mov", "matroska", "mpegts", "flv"}
# Codecs with one frame per packet, besides those with key frames only. VP8 also has packets without a visible frame.
FRAME_PER_PACKET = {"h264", "hevc", "vp9", "av1"}


class DamagedError(ValueError):
    """A file is damaged or cut short. The message is the reason, as the end of a sentence."""


@dataclass(frozen=True)
class Start:
    """A key frame from which decoding gives its frame and every later one, in presentation order."""

    frame: int
    """Number of the first frame that is shown from here on."""
    pts: int
    pos: int | None
    """Byte position of its packet in the file; identifies the packet together with `pts`."""
    seek: int
    """Time to seek to in the container."""


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a file, in the order in which a player shows them."""

    times: list[int | None]
    """Presentation time of each frame, in units of the stream's time base; None if the file has none."""
    last_duration: int
    """Duration of the last frame, in the same units; 0 if the file does not state it."""
    starts: list[Start]
    """Key frames in order, the first one at or before frame 0; empty: decode from the beginning of the file."""

    def start_for(self, number: int) -> Start | None:
        """The last key frame from which frame `number` can be decoded; None: the beginning of the file."""
        at = bisect_left(self.starts, number + 1, key=lambda start: start.frame)
        return self.starts[at - 1] if at else None

    def fps(self, time_base: Fraction | None, nominal: Fraction | None) -> float | None:
        """Frames per second: the file's nominal rate if the frames keep to it, else the number of frames over their duration.

        Returns:
            None if the file has neither times nor a nominal rate.
        """
        times = self._increasing_times()
        if times is None or time_base is None:
            return float(nominal) if nominal else None
        span = times[-1] - times[0]
        rate = len(times) / ((span + (self.last_duration or span / (len(times) - 1))) * time_base)
        # Containers round times, Matroska to milliseconds; with the nominal rate, 23.976 stays 24000/1001.
        if nominal and not self.is_variable and abs(rate / nominal - 1) < 0.01:
            rate = nominal
        return float(rate)

    @property
    def is_variable(self) -> bool:
        """True if any frame is shown more than one frame's duration away from its time at a constant rate."""
        times = self._increasing_times()
        if times is None:
            return False
        step = (times[-1] - times[0]) / (len(times) - 1)
        return any(abs(time - times[0] - number * step) > step for number, time in enumerate(times))

    def _increasing_times(self) -> list[int] | None:
        """The times if they are reliable, else None: some containers have none, and FFmpeg's guesses for AVI may decrease."""
        times = [time for time in self.times if time is not None]
        if len(times) < max(2, len(self.times)) or any(time >= following for time, following in pairwise(times)):
            return None
        return times


def index_packets(container: "InputContainer", stream: "VideoStream") -> FrameIndex | None:
    """Index a file by its packets, all of which are read without decoding.

    Returns:
        None if the packets do not prove which frames are shown.

    Raises:
        DamagedError: if a packet is corrupt, or the container shows that the file is cut short.
        av.FFmpegError: if the file cannot be read.
    """
    is_transport_stream = container.format.name.split(",")[0] == "mpegts"  # seeks to decoding times
    shown: dict[int, int] = {}  # durations by presentation time
    keys: list[tuple[int, int | None, int]] = []
    num_packets, latest = 0, None
    is_proven = _is_frame_per_packet(container, stream)
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.is_corrupt:
            raise DamagedError(f"the data of frame {num_packets} is incomplete, so the file is damaged or cut short")
        num_packets += 1
        if not is_proven:
            continue
        if packet.pts is None or packet.pts in shown:
            is_proven = False
            continue
        # Frames shown before a key frame may depend on frames before it (an open group of pictures). Frames shown after it do
        # not, provided that all of them also follow it in the file.
        if packet.is_keyframe and (latest is None or packet.pts > latest) and _is_random_access(packet, stream):
            seek = packet.dts if is_transport_stream and packet.dts is not None else packet.pts
            keys.append((packet.pts, packet.pos, seek))
        is_proven = bool(keys)
        latest = packet.pts if latest is None else max(latest, packet.pts)
        if not packet.is_discard:
            shown[packet.pts] = packet.duration or 0
    if num_packets < len(stream.index_entries):
        raise DamagedError(f"{num_packets} of {len(stream.index_entries)} frames are there, so the file is cut short")
    if not is_proven or not shown:
        return None
    times = sorted(shown)
    found = [Start(bisect_left(times, pts), pts, pos, seek) for pts, pos, seek in keys]
    # An edit list may hide all frames between key frames. Of several key frames with the same first frame, keep the last.
    starts = {start.frame: start for start in found}
    return FrameIndex([*times], shown[times[-1]], [*starts.values()])


def index_frames(container: "InputContainer", stream: "VideoStream") -> FrameIndex:
    """Index a file by decoding it once.

    Raises:
        DamagedError, av.FFmpegError: as `shown_frames` raises them.
    """
    times, duration = [], 0
    for frame in shown_frames(container, stream):
        times.append(frame.pts)
        duration = frame.duration or 0
    if not times:
        raise DamagedError("no frame in it can be decoded")
    return FrameIndex(times, duration, [])


def shown_frames(container: "InputContainer", stream: "VideoStream") -> Iterator["VideoFrame"]:
    """The frames of a newly opened file, in presentation order.

    A recording may begin in the middle of a group of pictures. Frames at the beginning that cannot be decoded are skipped, as
    players do.

    Raises:
        DamagedError: if a later frame cannot be decoded.
    """
    number = 0
    for packet in container.demux(stream):
        for frame in _decode(packet, stream, number):
            if frame.is_corrupt:
                if number:
                    raise DamagedError(f"frame {number} is damaged")
                continue
            yield frame
            number += 1


def seek_packets(container: "InputContainer", stream: "VideoStream", start: Start) -> Iterator["Packet"] | None:
    """The packets from a key frame on; None if seeking goes past it."""
    container.seek(start.seek, stream=stream)
    packets = container.demux(stream)
    for packet in packets:
        if (packet.pts, packet.pos) == (start.pts, start.pos):
            return chain([packet], packets)
        if not packet.size or (packet.is_keyframe and packet.pts is not None and packet.pts > start.pts):
            return None
    return None


def packets_from(packets: Iterator["Packet"], start: Start) -> Iterator["Packet"]:
    """The packets from a key frame on, by skipping the ones before it in the file."""
    return dropwhile(lambda packet: (packet.pts, packet.pos) != (start.pts, start.pos), packets)


def frames_from(packets: Iterator["Packet"], stream: "VideoStream", first_time: int) -> Iterator["VideoFrame"]:
    """The frames from `first_time` on, decoded from packets that begin with a key frame.

    Raises:
        DamagedError, av.FFmpegError: if a frame cannot be decoded.
    """
    for packet in packets:
        for frame in stream.decode(packet):
            # Frames that are shown before the key frame but follow it in the file lack their reference frames.
            if frame.pts is not None and frame.pts < first_time:
                continue
            if frame.is_corrupt:
                raise DamagedError("a frame is damaged")
            yield frame


def _decode(packet: "Packet", stream: "VideoStream", number: int) -> list["VideoFrame"]:
    import av

    # In AVI, an empty packet repeats the last frame; a decoder would take it for the end of the stream.
    if not packet.size and packet.dts is not None:
        return []
    try:
        return stream.decode(packet)
    except av.FFmpegError as error:
        if number:
            raise DamagedError(f"frame {number} cannot be decoded ({error.strerror})") from error
        return []


def _is_frame_per_packet(container: "InputContainer", stream: "VideoStream") -> bool:
    codec = stream.codec_context.codec
    return (
        container.format.name.split(",")[0] in TIMED_CONTAINERS
        and (codec.canonical_name in FRAME_PER_PACKET or codec.intra_only)
        # Each field of interlaced video may have its own packet. 0: unknown, 1: progressive.
        and stream.codec_context.field_order in (0, 1)
    )


def _is_random_access(packet: "Packet", stream: "VideoStream") -> bool:
    """True if a packet that its container flags as a key frame depends on no earlier packet, judged by its content.

    Containers also flag frames from which the picture recovers gradually (H.264's intra refresh).
    """
    codec = stream.codec_context.codec.canonical_name
    if codec not in ("h264", "hevc"):
        return True
    recovers = False
    for unit in _nal_units(bytes(packet), stream.codec_context.extradata, codec):
        if not unit:
            continue
        if codec == "hevc":
            kind = unit[0] >> 1 & 0x3F
            if kind < 32:  # the first slice
                return 16 <= kind <= 23  # H.265, table 7-1: intra random access point
        else:
            kind = unit[0] & 0x1F  # H.264, table 7-1
            if kind == 6:
                recovers = recovers or _recovers_at_once(unit)
            elif kind in (1, 5):
                return kind == 5 or recovers  # 5: IDR
    return False


def _nal_units(data: bytes, extradata: bytes | None, codec: str) -> Iterator[bytes]:
    """The NAL units of an H.264 or HEVC packet, preceded by their lengths, as in mp4, or by start codes, as in ts."""
    if not extradata or extradata[0] != 1:
        yield from re.split(b"\0\0\1", data)[1:]
        return
    size = (extradata[4 if codec == "h264" else 21] & 3) + 1
    at = 0
    while at + size < len(data):
        length = int.from_bytes(data[at : at + size], "big")
        yield data[at + size : at + size + length]
        at += size + length


def _recovers_at_once(unit: bytes) -> bool:
    """True if H.264's supplemental enhancement information states that all frames from this one on are exact (D.1.8)."""
    data = unit[1:].replace(b"\0\0\3", b"\0\0")
    at = 0
    try:
        while True:
            values = []
            for _ in ("type", "size"):  # each the sum of a run of 255 and a last byte
                value = 0
                while data[at] == 255:
                    value, at = value + 255, at + 1
                values.append(value + data[at])
                at += 1
            if values[0] == 6:
                return data[at] >= 0xC0  # recovery_frame_cnt = 0, exact_match_flag = 1
            at += values[1]
    except IndexError:
        return False


def is_cut_matroska(path: Path) -> bool:
    """True if a Matroska file is shorter than its header states. FFmpeg does not report this.

    Source: RFC 8794 (EBML) and RFC 9559, section 5.1.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    at = 0
    try:
        while True:
            name = head[at : at + 5 - (head[at] >> 4).bit_length()]
            at += len(name)
            width = 9 - head[at].bit_length()
            size = int.from_bytes(head[at : at + width], "big") - (1 << 7 * width)
            at += width
            if name == b"\x18\x53\x80\x67":  # Segment
                return size != (1 << 7 * width) - 1 and path.stat().st_size < at + size  # all ones: unknown size
            at += size
    except IndexError:
        return False
