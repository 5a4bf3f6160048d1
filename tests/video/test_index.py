import av
import pytest

from mask2dit.video.index import FrameIndex, Start, index_packets


def index_of(path):
    with av.open(str(path)) as container:
        return index_packets(container, container.streams.video[0])


@pytest.mark.parametrize(
    "name",
    [
        "closed.mp4",
        "fragments.mp4",
        "closed.mkv",
        "closed.ts",
        "h264.flv",
        "opengop.mp4",
        "hevc.mp4",
        "hevc.ts",
        "av1.mp4",
    ],
)
def test_every_key_frame_is_a_start_where_it_stands_for_itself(name, numbered):
    assert [start.frame for start in index_of(numbered(name)).starts] == list(range(0, 90, 12))


@pytest.mark.parametrize("name", ["refresh.mp4"])
def test_a_key_frame_from_which_the_picture_recovers_gradually_is_no_start(name, numbered):
    path = numbered(name)
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > 1
    assert [start.frame for start in index_of(path).starts] == [0]


@pytest.mark.parametrize(
    "name", ["mpeg4.avi", "h264.avi", "vp8.webm", "interlaced.mp4", "mpeg2.mpg", "raw.h264", "cut_hevc.mkv"]
)
def test_where_packets_prove_nothing_there_is_no_index_of_them(name, numbered):
    assert index_of(numbered(name)) is None


def test_key_frames_that_an_edit_list_hides_are_starts_for_what_is_shown_after_them(numbered):
    starts = index_of(numbered("cut.mp4")).starts
    assert starts[0].frame == 0 and [start.frame for start in starts[1:]] == [3, 15, 27, 39, 51]


def test_the_start_for_a_frame_is_the_last_one_before_it():
    index = FrameIndex(list(range(30)), 1, [Start(frame, frame, frame, frame) for frame in (0, 10, 20)])
    assert [index.start_for(number).frame for number in (0, 9, 10, 19, 29)] == [0, 0, 10, 10, 20]
    assert FrameIndex([0, 1], 1, []).start_for(1) is None
