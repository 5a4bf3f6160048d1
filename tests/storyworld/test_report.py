import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from mask2dit.storyworld.render import render_story
from mask2dit.storyworld.report import ABLATIONS, NOT_RUN, ReportConfig, measure_video, write_report
from mask2dit.storyworld.trial import TrialConfig, story_of, story_seeds, video_path
from mask2dit.storyworld.world import sample_story, with_new_identity
from mask2dit.video.writing import write_video

PAGE = "\n".join(
    f"<!-- begin {name} -->\n<!-- end {name} -->"
    for name in ("trials", "kinds", "casts", "steps", "contexts", "pictures", *ABLATIONS)
)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "page.md").write_text(f"# A page\n\n{PAGE}\n\nThe end\n")
    return ReportConfig(
        trials=str(tmp_path / "trials"), ablations=str(tmp_path / "ablations"), page=str(tmp_path / "page.md")
    )


@pytest.fixture
def perfect(tmp_path):
    """A trial whose model would have drawn every story as the world does."""

    def make(name="trials/held_out/fixed", task="fixed", split="held_out", stories="reporting", **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        trial = TrialConfig(task=task, split=split, stories=stories, output_dir=str(folder), num_stories=3, **changes)
        (folder / "trial.json").write_text(json.dumps({"config": asdict(trial)}))
        for seed in story_seeds(trial):
            write_video(video_path(folder, seed), np.concatenate(render_story(sample_story(seed, 3, split))), 8)
        return folder

    return make


def test_rendered_stories_are_measured_as_right_and_consistent(config, perfect, tmp_path):
    perfect()
    perfect("trials/train/fixed", split="train", stories="tuning")
    write_report(config)
    page = (tmp_path / "page.md").read_text()
    new, unseen = [line for line in page.splitlines() if line.startswith("| all scenes at once |")][:2]
    right = "100% (100 to 100) | 100% (100 to 100) | 0.9"
    assert new.startswith(f"| all scenes at once | new stories | 3 tuning | 10 dpm | {right}")
    assert unseen.startswith(f"| all scenes at once | unseen combinations | 3 reporting | 10 dpm | {right}")
    assert page.startswith("# A page") and page.endswith("The end\n")
    assert "![The best stories](page/good.png)" in page and f"A longer story: {NOT_RUN}" in page
    assert f"| v1: scenes isolated | {NOT_RUN} | {NOT_RUN} |" in page
    assert {"results.json", "good.png", "failed.png"} <= {path.name for path in (tmp_path / "page").iterdir()}


def test_scenes_are_counted_by_the_actors_of_their_story(config, perfect, tmp_path):
    perfect("trials/train/fixed", split="train")
    write_report(config)
    seeds = story_seeds(TrialConfig(split="train", stories="reporting", num_stories=3))
    casts = [len(sample_story(seed, 3, "train").actors) for seed in seeds]
    found = json.loads((tmp_path / "page/results.json").read_text())["trials/train/fixed"]["right_by_cast"]
    assert found == {str(count): [1, 1, 1, casts.count(count)] for count in set(casts)}
    columns = [f"100% (100 to 100), {casts.count(k)} stories" if k in casts else NOT_RUN for k in (1, 2, 3)]
    assert f"| all scenes at once | new stories | {' | '.join(columns)} |" in (tmp_path / "page.md").read_text()


def test_an_actor_that_returns_is_compared_with_its_first_scene():
    trial = TrialConfig(task="return", split="train")
    story = story_of(trial, 3)
    same = np.concatenate(render_story(story))
    other = np.concatenate([*render_story(story)[:3], render_story(with_new_identity(story, 5))[3]])
    assert measure_video(trial, 3, same)["returned"] > 0.9
    assert measure_video(trial, 3, other)["returned"] < 0.1


def test_samplers_numbers_of_steps_and_guidance_are_listed_in_order(config, perfect, tmp_path):
    for sampler, steps, interval in (("dpm", 6, [500, 1000]), ("dpm", 6, None), ("ddim", 30, None), ("ddim", 4, None)):
        settings = {"sampler": sampler, "num_inference_steps": steps, "guidance_interval": interval}
        perfect(f"trials/steps/{sampler}_{steps}_{interval}", **settings)
    write_report(config)
    lines = (tmp_path / "page.md").read_text().splitlines()
    rows = [line.removeprefix("| ").split(" | ")[:3] for line in lines if line.startswith(("| ddim", "| dpm"))]
    assert rows == [["ddim", "4", "2"], ["ddim", "30", "2"], ["dpm", "6", "2"], ["dpm", "6", "2 in 500 to 1000"]]


def test_only_generated_scenes_and_their_pairs_count():
    trial = TrialConfig(task="extension")
    seed = story_seeds(trial)[0]
    story = sample_story(seed, 3, "held_out")
    other = with_new_identity(story, 7)
    right, foreign = render_story(story), render_story(other)
    # Scenes that were given do not agree with each other here, which is not the model's doing.
    video = np.concatenate([foreign[0], right[1], right[2]])
    measured = measure_video(trial, seed, video)
    assert measured["right"] == [True]
    assert measured["to_first"][0] < 0.6 and measured["consistency"] > measured["to_first"][0]
    assert measure_video(TrialConfig(), seed, np.concatenate(right))["right"] == [True] * 3


def test_the_page_can_be_rebuilt_without_the_videos(config, perfect, tmp_path):
    folder = perfect("ablations/v2/trials/fixed")
    write_report(config)
    before = (tmp_path / "page.md").read_text()
    assert before.count("| 100% (100 to 100) | 100% (100 to 100) | 0.9") == 3  # v2 stands in three tables
    shutil.rmtree(folder)
    write_report(config)
    assert (tmp_path / "page.md").read_text() == before


def test_a_page_without_a_place_for_a_table_is_refused(config, tmp_path):
    (tmp_path / "page.md").write_text("# A page\n")
    with pytest.raises(ValueError, match="no place for 'trials'"):
        write_report(config)
    with pytest.raises(FileNotFoundError, match="no page"):
        write_report(ReportConfig(page=str(tmp_path / "nowhere.md")))
