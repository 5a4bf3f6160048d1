import sys

import pytest

from mask2dit.evaluation.config import VBenchConfig
from mask2dit.evaluation.measures.registry import build_measure
from mask2dit.evaluation.measures.vbench import VBenchMeasure

PROGRAM = """#!{python}
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("task"); parser.add_argument("--mode"); parser.add_argument("--dimension")
parser.add_argument("--videos_path"); parser.add_argument("--output_path")
a = parser.parse_args()
assert (a.task, a.mode) == ("evaluate", "custom_input")
if a.dimension == "motion_smoothness":
    sys.exit("no GPU")
value = {{"imaging_quality": 60.0, "dynamic_degree": True}}[a.dimension]
videos = [{{"video_path": str(p), "video_results": value}} for p in sorted(pathlib.Path(a.videos_path).iterdir())]
folder = pathlib.Path(a.output_path)
(folder / "results_2026_eval_results.json").write_text(json.dumps({{a.dimension: [0.5, videos]}}))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "vbench-program"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_scenes_are_scored_by_the_program_of_another_environment(program, tmp_path, story_video):
    config = VBenchConfig(command=program, dimensions=["imaging_quality", "dynamic_degree"])
    measure = VBenchMeasure(config, tmp_path / "work")
    measure.prepare([story_video])
    assert [column.key for column in measure.columns] == ["vbench_imaging_quality", "vbench_dynamic_degree"]
    scores = measure.score(story_video)
    assert scores.values == {"vbench_imaging_quality": 60.0, "vbench_dynamic_degree": 100.0}
    assert len(scores.details["imaging_quality"]) == 3


def test_a_failure_says_what_the_program_said(program, tmp_path, story_video):
    measure = VBenchMeasure(VBenchConfig(command=program, dimensions=["motion_smoothness"]), tmp_path / "work")
    with pytest.raises(ValueError, match=r"VBench failed at motion_smoothness \(exit status 1\): no GPU"):
        measure.prepare([story_video])


def test_parts_of_one_output_leave_each_others_files_alone(program, config, story_video):
    def measure(part):
        vbench = VBenchConfig(command=program, dimensions=["imaging_quality"])
        return build_measure(config(shard=part, vbench=vbench), "vbench")

    first = measure("0/2")
    first.prepare([story_video])
    files = sorted(first.folder.rglob("*.*"))
    assert len(files) == 4  # three scenes and the result
    for part in ("1/2", "0/1"):
        measure(part).prepare([])
    assert sorted(first.folder.rglob("*.*")) == files


def test_dimensions_that_need_vbenchs_own_prompts_are_refused():
    with pytest.raises(ValueError, match=r"vbench\.dimensions has to be one of .* but is 'human_action'"):
        VBenchConfig(dimensions=["human_action"])
