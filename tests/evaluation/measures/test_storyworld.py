import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mask2dit.evaluation.measures.storyworld import StoryWorldMeasure
from mask2dit.evaluation.results import Results
from mask2dit.evaluation.run import evaluate
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.stories import Scene, Story, read_stories, write_stories
from mask2dit.storyworld.render import render_story
from mask2dit.storyworld.world import caption, sample_story
from mask2dit.video.writing import write_video

SHIPPED = Path(__file__).parents[3] / "datasets/evaluation/storyworld.yaml"


def story_of(seed: int, **changes):
    """A story of the small world as the evaluation has it, and the one that it is drawn from."""
    drawn = sample_story(seed, 3, "held_out", **changes)
    prompts = tuple(caption(drawn, k) for k in range(3))
    return Story(title=f"Held-out story {seed}", scenes=tuple(Scene(prompt=prompt) for prompt in prompts)), drawn


def film(folder: Path, story: Story, scenes) -> StoryVideo:
    path = folder / f"{story.name}.mp4"
    folder.mkdir(exist_ok=True)
    write_video(path, np.concatenate(scenes), fps=8)
    path.with_suffix(".json").write_text(json.dumps({"boundaries": [9, 18]}))
    return StoryVideo(story=story, path=path, boundaries=(9, 18))


def test_a_story_that_is_drawn_right_has_full_marks(tmp_path):
    story, drawn = story_of(1)
    values = StoryWorldMeasure().score(film(tmp_path, story, render_story(drawn))).values
    assert values["world_semantic"] == values["world_all_right"] == values["world_cuts_right"] == 100
    assert values["world_visual"] > 90


def test_another_identity_lowers_visual_and_other_texts_lower_semantic_scores(tmp_path):
    story, drawn = story_of(1, drift=1.0)
    values = StoryWorldMeasure().score(film(tmp_path / "a", story, render_story(drawn))).values
    assert values["world_semantic"] == 100 and values["world_visual"] < 60
    values = StoryWorldMeasure().score(film(tmp_path / "b", story, render_story(story_of(2)[1]))).values
    assert values["world_semantic"] < 80 and values["world_all_right"] == 0


def test_one_scene_repeated_is_consistent_but_has_no_cuts(tmp_path):
    story, drawn = story_of(1)
    values = StoryWorldMeasure().score(film(tmp_path, story, [render_story(drawn)[0]] * 3)).values
    assert values["world_cuts_right"] == 0


def test_the_truth_stands_beside_learned_scores_with_their_correlation(config, tmp_path):
    stories = [story_of(seed, drift=seed / 4) for seed in range(4)]
    for story, drawn in stories:
        film(tmp_path / "world", story, render_story(drawn))
    scenes = tuple(Scene(prompt=prompt) for prompt in ("A fox.", "An owl.", "A hare."))
    other = Story(title="The Fox", scenes=scenes)
    film(tmp_path / "world", other, render_story(stories[0][1]))
    write_stories(tmp_path / "world.yaml", [*(story for story, _ in stories), other])
    settings = config(stories=str(tmp_path / "world.yaml"), videos=str(tmp_path / "world"), storyworld=True)
    assert evaluate(settings) == 0
    results = Results.read(settings.output)
    assert set(results.values("world_visual")) == {story.name for story, _ in stories}
    assert len(results.values("visual")) == 5
    assert results.off["storyworld"].startswith("not for 1 of 5 stories, such as: the caption 'A fox.'")
    page = (Path(settings.output) / "report.html").read_text()
    assert "Learned scores against the truth" in page and ">Small world: visual</th>" in page
    off = dataclasses.replace(settings, storyworld=False, output=str(tmp_path / "off"))
    evaluate(off)
    assert Results.read(off.output).off["storyworld"] == "not asked for"


@pytest.mark.parametrize("index", range(0, 50, 7))
def test_the_shipped_stories_are_those_of_their_seeds(index):
    story = read_stories(SHIPPED)[index]
    drawn = sample_story(int(story.title.split()[-1]), 3, "held_out")
    assert story.prompts == tuple(caption(drawn, k) for k in range(3))
    assert len(story.cast) == len(drawn.actors)
