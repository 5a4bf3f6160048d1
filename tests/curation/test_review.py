import json
import re
from dataclasses import asdict

import pytest

from mask2dit.curation.caption import Captions
from mask2dit.curation.config import CurationConfig, ExportConfig
from mask2dit.curation.doubts import doubtful_cuts
from mask2dit.curation.export import export, in_validation
from mask2dit.curation.review import Decision, read_decisions, write_review
from mask2dit.curation.store import Dropped

FOX = "a red fox, wearing a blue scarf"
TEXTS = [f"Actor1 ({FOX}) {does}." for does in ("walks", "runs", "sleeps")]


@pytest.fixture
def captions(story):
    group, _, _ = story
    return Captions(
        id=group.id,
        source=group.source,
        key="captions",
        clips=group.clips,
        actors={"Actor1": FOX},
        captions=TEXTS,
        model="m",
        prompt_version="1",
        attempts=1,
        input_tokens=1,
        output_tokens=1,
    )


@pytest.fixture
def decide(story, captions):
    """Writes a decision as the page saves it, and reads it back."""

    def make(**changes):
        path = story[2] / "decisions.json"
        decision = {"id": captions.id, "drop": False, "actors": {"Actor1": FOX}, "captions": TEXTS, **changes}
        path.write_text(json.dumps({"captions": decision}))
        return read_decisions(path, [captions], 150)

    return make


def page_entries(page):
    return page_data(page)["entries"]


def page_data(page):
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(data[1])


def test_the_page_shows_clips_captions_and_scores(story, captions):
    group, clips, folder = story
    page = write_review(folder, {group.id: group}, clips, [captions], {group.id: [0.3, 0.1, 0.2]}, {}, 0.15)
    [entry] = page_entries(page)
    assert entry["captions"] == TEXTS and entry["actors"] == {"Actor1": FOX}
    assert [clip["path"] for clip in entry["clips"]] == ["0.mp4", "1.mp4", "2.mp4"]
    assert [clip["cosine"] for clip in entry["clips"]] == [0.3, 0.1, 0.2]
    assert entry["flagged"] and entry["adjacent"] == [0.9, 0.9] and entry["decision"] is None
    assert all((folder / clip["poster"]).stat().st_size for clip in entry["clips"])


def test_the_page_lists_cuts_that_look_false_and_transitions_that_may_be_missed(story, captions):
    group, clips, folder = story
    first, second, third = clips
    fault = {"clips": [first, second, third], "similarity": [[1.0, 0.99, 0.5], [0.99, 1.0, 0.5], [0.5, 0.5, 1.0]]}
    window = Dropped(id="w", source="film.mp4", rule="above_ceiling", why="", details=fault)
    doubts = doubtful_cuts([window], clips, ceiling=0.98, doubts={third: [24, 99]})
    assert [doubt.frames for doubt in doubts] == [((first, 8), (second, 0)), ((third, 0), (third, 8))]
    page = write_review(folder, {group.id: group}, clips, [captions], {}, {}, 0.15, doubts).read_text()
    assert "Cuts to look at: 2" in page and "no cut at frame 24" in page
    assert all((folder / path).is_file() for path in re.findall(r'<img src="([^"]+)"', page))


def test_captions_cannot_break_out_of_the_page(story, captions):
    group, clips, folder = story
    nasty = Captions(**{**asdict(captions), "captions": ["</script><b>bold.", "<!-- hm.", "“quoted” & more."]})
    page = write_review(folder, {group.id: group}, clips, [nasty], {}, {}, 0.15)
    assert page_entries(page)[0]["captions"] == nasty.captions


def test_decisions_so_far_stand_in_the_page(story, captions, decide):
    group, clips, folder = story
    decisions = decide(captions=[text.replace("walks", "strolls") for text in TEXTS])
    [entry] = page_entries(write_review(folder, {group.id: group}, clips, [captions], {}, decisions, 0.15))
    assert entry["decision"] == "keep" and "strolls" in entry["captions"][0]
    assert "walks" in entry["written"][1][0]


def test_no_file_means_no_decisions(tmp_path, captions):
    assert read_decisions(tmp_path / "decisions.json", [captions], 150) == {}


def test_decisions_about_captions_that_are_not_shown_stay_in_the_page(story, captions):
    group, clips, folder = story
    old = Decision(id="old", drop=False, actors={}, captions=["not checked"])
    (folder / "decisions.json").write_text(json.dumps({"old": asdict(old)}))
    decisions = read_decisions(folder / "decisions.json", [captions], 150)
    page = write_review(folder, {group.id: group}, clips, [captions], {}, decisions, 0.15)
    assert page_data(page)["others"] == {"old": asdict(old)}


def test_the_page_knows_whether_a_run_has_read_other_decisions(story, captions, decide):
    group, clips, folder = story
    arguments = (folder, {group.id: group}, clips, [captions], {})
    none, one, again = (page_data(write_review(*arguments, found, 0.15))["read"] for found in ({}, decide(), decide()))
    assert none != one == again


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"captions": TEXTS[:2]}, "there are 3 clips, but 2 captions"),
        ({"captions": ["Actor1 (a fox) walks.", *TEXTS[1:]]}, "first mention of Actor1 has to be"),
    ],
)
def test_edits_that_break_the_form_are_refused_by_the_groups_name(decide, changes, message):
    with pytest.raises(
        ValueError, match=rf"decisions.json holds captions that cannot be used: film.mp4#0-29: .*{message}"
    ):
        decide(**changes)
    assert decide(drop=True, **changes)  # what is dropped may say anything


def test_a_file_that_the_page_did_not_save_is_named(tmp_path, captions):
    (tmp_path / "decisions.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not what the review page saves"):
        read_decisions(tmp_path / "decisions.json", [captions], 150)


@pytest.fixture
def exported(story, captions, tmp_path):
    """Exports the story, or copies of it from other films, with decisions."""
    _, clips, folder = story

    def make(decisions=(), share=0.0, num_frames=3):
        target = tmp_path / "manifests"
        settings = ExportConfig(folder=str(target), validation_share=share)
        config = CurationConfig(num_frames=num_frames, max_stride=2, export=settings)
        return target, *export(folder, config, clips, [captions], dict(decisions))

    return make


def test_manifests_have_the_trainers_form(exported):
    target, rows, _ = exported()
    assert rows == {"sft.json": 1, "pretrain.csv": 3, "sft_validation.json": 0, "pretrain_validation.csv": 0}
    [row] = json.loads((target / "sft.json").read_text())
    assert row["prefix"] == "film.mp4#0-29"
    assert row["values"][0] == {
        "vid": "film.mp4#0-9",
        "width": 96,
        "height": 64,
        "duration": 1.125,
        "fps": 8.0,
        "url": "../0.mp4",
        "caption": TEXTS[0],
    }
    lines = (target / "pretrain.csv").read_text().splitlines()
    assert lines[:2] == ["fps,width,height,caption,path,num_frame", f'8.0,96,64,"{TEXTS[0]}",../0.mp4,9']


def test_clips_too_short_for_pretraining_are_in_groups_only(exported):
    _, rows, _ = exported(num_frames=5)
    assert (rows["sft.json"], rows["pretrain.csv"]) == (1, 0)


def test_what_a_person_drops_or_edits_is_dropped_or_edited(exported, decide):
    edited = [text.replace("walks", "strolls") for text in TEXTS]
    target, _, _ = exported(decide(captions=edited))
    assert "strolls" in (target / "sft.json").read_text() and "strolls" in (target / "pretrain.csv").read_text()
    _, rows, [result] = exported(decide(drop=True))
    assert isinstance(result, Dropped) and result.rule == "review"
    assert not any(rows.values())


def test_a_film_is_in_one_part_whatever_else_there_is(exported):
    shares = [in_validation(f"film {i}", 0.2) for i in range(500)]
    assert 60 < sum(shares) < 140
    assert not any(in_validation(f"film {i}", 0.0) for i in range(50))
    _, rows, _ = exported(share=0.99999)
    assert (rows["sft.json"], rows["sft_validation.json"], rows["pretrain_validation.csv"]) == (0, 1, 3)
