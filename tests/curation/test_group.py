import numpy as np
import pytest
from safetensors.numpy import save_file

from mask2dit.curation.config import GroupConfig
from mask2dit.curation.embed import Embedder, Features, read_features
from mask2dit.curation.group import Group, adjacent_pairs, by_film, group, single
from mask2dit.curation.store import Dropped
from mask2dit.curation.write import Clip
from mask2dit.data.config import DataConfig
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.video.reading import open_video
from mask2dit.video.writing import write_video


def clip(number, gap=0, num_frames=20, source="film.mp4"):
    start = 24 * number + gap
    return Clip(
        id=f"{source}#{start}",
        source=source,
        key=f"{source} {number}",
        file=source,
        path=f"{number}.mp4",
        start=start,
        stop=start + num_frames,
        crop=[0, 0, 64, 96],
        num_frames=num_frames,
        fps=24.0,
        width=96,
        height=64,
    )


@pytest.fixture
def windows(tmp_path):
    """What becomes of clips whose features lie at given angles, so that neighbours have the cosine of the difference."""

    def make(degrees, clips=None, **changes):
        clips = clips or [clip(i) for i in range(len(degrees))]
        angles = np.radians(degrees)
        tensors = {c.id: np.array([np.cos(a), np.sin(a)], np.float32) for c, a in zip(clips, angles)}
        save_file(tensors, tmp_path / "features.safetensors")
        features = [Features(id=c.id, source=c.source, key=c.key, path="features.safetensors") for c in clips]
        films = by_film(features, {c.id: c for c in clips})
        config = GroupConfig(**{"num_scenes": 3, "threshold": 0.7, "ceiling": 0.99, "max_gap": 0.5, **changes})
        return [entry for _, results in group(films, tmp_path, config) for entry in results]

    return make


def test_related_clips_make_a_group_with_every_pairwise_cosine(windows):
    [found] = windows([0, 30, 60])
    assert isinstance(found, Group) and len(found.clips) == 3
    assert found.similarity[0] == pytest.approx([1, np.cos(np.pi / 6), np.cos(np.pi / 3)], abs=1e-3)


def test_unrelated_neighbours_fall_below_the_threshold(windows):
    [found] = windows([0, 30, 90])
    assert (found.rule, found.why) == ("below_threshold", "clips 2 and 3 have the cosine 0.500")
    assert len(found.details["similarity"]) == 3
    assert isinstance(windows([0, 30, 90], threshold=0.4)[0], Group)


def test_the_same_scene_twice_is_above_the_ceiling(windows):
    [found] = windows([0, 2, 32])
    assert (found.rule, found.why) == ("above_ceiling", "clips 1 and 2 have the cosine 0.999")
    [found] = windows([0, 40, 2])
    assert (found.rule, found.why) == ("above_ceiling", "clips 1 and 3 have the cosine 0.999")


def test_a_gap_in_the_film_parts_clips(windows):
    clips = [clip(0), clip(1), clip(2, gap=30)]
    [found] = windows([0, 30, 60], clips)
    assert (found.rule, found.why) == ("gap", "1.42 s between clips 2 and 3")
    assert isinstance(windows([0, 30, 60], clips, max_gap=1.5)[0], Group)


def test_a_clip_is_in_one_group_only(windows):
    found = windows([0, 30, 60, 90, 120, 150])
    assert [getattr(entry, "rule", "kept") for entry in found] == ["kept", "overlap", "overlap", "kept"]


def test_clips_of_two_films_are_never_grouped(windows):
    clips = [clip(0), clip(1), clip(2, source="other.mp4"), clip(3, source="other.mp4")]
    assert windows([0, 30, 60, 90], clips) == []


def test_each_neighbouring_pair_is_counted_once(windows):
    cosines = list(adjacent_pairs(windows([0, 30, 60, 90])).values())
    assert cosines == pytest.approx([np.cos(np.pi / 6)] * 3, abs=1e-3)


def test_clips_alone_have_to_be_long_enough_for_pretraining():
    data = DataConfig(kind="pretrain", num_frames=9, max_stride=3)
    [long, short] = [entry for _, [entry] in single([clip(0, num_frames=30), clip(1, num_frames=29)], data)]
    assert isinstance(long, Group) and long.clips == [clip(0).id]
    assert isinstance(short, Dropped) and short.why.startswith("29 frames, but 30 are needed")


def test_copies_are_above_the_ceiling_and_unrelated_clips_below_the_threshold(tmp_path, tiny_viclip, drawing):
    plain = drawing.Scene("plain", "#d62b3a", 16, zoom=1.5, light=drawing.EVENING)
    scenes = {
        "scene": plain,
        "copy": plain,
        "related": drawing.Scene("plain", "#d62b3a", 16, zoom=1.2, light=(0.8, 0.6, 0.45)),
        "unrelated": drawing.Scene("town", "#2a6fd6", 16, light=drawing.MORNING),
    }
    paths = [tmp_path / f"{name}.mp4" for name in scenes]
    for path, scene in zip(paths, scenes.values()):
        write_video(path, [drawing.draw(scene, k / 15) for k in range(16)], drawing.FPS)
    embedder = Embedder(ViCLIPConfig(weights=str(tiny_viclip)), "cpu")
    features, _ = embedder.videos(map(open_video, paths))
    copy, related, unrelated = features[0] @ features[1:].T
    config = GroupConfig(threshold=0.8, ceiling=0.9999)
    assert copy > config.ceiling > related > config.threshold > unrelated


def test_lost_features_are_named_with_the_remedy(tmp_path):
    entry = Features(id="a", source="a", key="a", path="gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing: .* run again"):
        read_features([entry], tmp_path)
