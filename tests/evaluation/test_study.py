import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mask2dit.evaluation.results import Results
from mask2dit.evaluation.run import evaluate
from mask2dit.evaluation.study import QUESTIONS, StudyConfig, tally, write_study


@pytest.fixture
def study(config, tmp_path):
    for name in ("one", "two"):
        evaluate(config(name=name, output=str(tmp_path / name)))
    runs = [str(tmp_path / name) for name in ("one", "two")]

    def make(**changes):
        return StudyConfig(**{"runs": runs, "output": str(tmp_path / "study"), **changes})

    return make


def read_key(config: StudyConfig) -> dict:
    return json.loads((Path(config.output) / "key.json").read_text())


def change_prompts(folder: str, *names: str) -> None:
    """Gives these stories of an evaluated run other prompts."""
    results = Results.read(folder)
    stories = [replace(s, prompts=["another", *s.prompts[1:]]) if s.name in names else s for s in results.stories]
    replace(results, stories=stories).write(folder)


def test_the_page_gives_nothing_away_and_the_key_knows(study):
    page = write_study(study()).read_text()
    folder = Path(study().output)
    key = read_key(study())["runs"]
    assert all(sorted(order) == ["one", "two"] for order in key.values()) and len(key) == 3
    assert {path.name for path in (folder / "videos").iterdir()} == {
        f"00{i}{place}.mp4" for i in range(3) for place in "ab"
    }
    assert page.count('type="radio"') == 3 * len(QUESTIONS) * 2
    assert not any(f">{name}<" in page for name in ("one", "two"))


def test_the_page_keeps_answers_in_the_browser_by_study(study, tmp_path):
    def kept_under(output="study", **changes):
        changes["output"] = str(tmp_path / output)
        page = write_study(study(**changes)).read_text()
        assert "localStorage.setItem(study" in page and "localStorage.getItem(study" in page
        return re.search(r'<form id="form" data-study="(.+?)"', page)[1]

    name = kept_under()
    assert kept_under() == name
    assert kept_under("fewer", num_stories=2) != name
    video = Path(Results.read(study().runs[0]).stories[0].video)
    video.write_bytes(video.read_bytes() + b"0")
    assert kept_under("other video") != name


def test_a_folder_with_another_study_is_refused_and_stays_as_it_was(study):
    write_study(study())
    files = {path: path.read_bytes() for path in Path(study().output).rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match=rf"holds {read_key(study())['study']}, .* choose another output"):
        write_study(study(num_stories=2, runs=study().runs[::-1]))
    assert {path: path.read_bytes() for path in Path(study().output).rglob("*") if path.is_file()} == files


def test_orders_are_shuffled_by_the_seed(study, tmp_path):
    orders = []
    for seed in range(8):
        of_seed = study(seed=seed, output=str(tmp_path / str(seed)))
        write_study(of_seed)
        orders.append(json.dumps(read_key(of_seed)["runs"], sort_keys=True))
    assert len(set(orders)) > 1


def test_votes_are_counted_for_the_run_and_not_for_the_place(study, tmp_path):
    write_study(study())
    key = read_key(study())
    chosen = {story: order.index("two") for story, order in key["runs"].items()}
    answers = {f"{story} {question}": place for story, place in chosen.items() for question in QUESTIONS}
    (tmp_path / "answers.json").write_text(json.dumps({"study": key["study"], "answers": answers}))
    text = tally(study(answers=[str(tmp_path / "answers.json")])).read_text()
    assert "| overall | 0.0% (0) | 100.0% (3) |" in text
    (tmp_path / "answers.json").write_text(json.dumps({"study": key["study"], "answers": {"elsewhere overall": 0}}))
    with pytest.raises(ValueError, match="to the study"):
        tally(study(answers=[str(tmp_path / "answers.json")]))


def test_answers_to_another_study_of_the_same_stories_are_refused(study, tmp_path):
    page = write_study(study()).read_text()
    assert f'data-study="{read_key(study())["study"]}"' in page and "JSON.stringify({ study, answers }" in page
    sent = read_key(study())
    answers = {f"{story} overall": 0 for story in sent["runs"]}
    (tmp_path / "answers.json").write_text(json.dumps({"study": sent["study"], "answers": answers}))
    other = study(seed=1, output=str(tmp_path / "other"), answers=[str(tmp_path / "answers.json")])
    write_study(other)
    later = read_key(other)["study"]
    with pytest.raises(ValueError, match=rf"answers to {sent['study']}, but .*key\.json is of {later}"):
        tally(other)
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    with pytest.raises(ValueError, match=r"answers\.json has to hold .*study"):
        tally(study(answers=[str(tmp_path / "answers.json")]))


def test_stories_whose_prompts_differ_between_runs_are_not_compared(study):
    change_prompts(study().runs[1], "the-fox")
    write_study(study())
    assert sorted(read_key(study())["runs"]) == ["the-hare", "the-owl"]
    change_prompts(study().runs[1], "the-owl", "the-hare")
    with pytest.raises(ValueError, match="one, two share no story with the same prompts"):
        write_study(study())


def test_a_study_needs_two_runs_that_can_be_told_apart(study, tmp_path):
    with pytest.raises(ValueError, match="2 to 10 runs"):
        StudyConfig(runs=["one"])
    with pytest.raises(ValueError, match="same name"):
        write_study(study(runs=[study().runs[0]] * 2))
    with pytest.raises(FileNotFoundError, match="evaluate that run first"):
        write_study(study(runs=[study().runs[0], str(tmp_path)]))
    assert isinstance(Results.read(study().runs[0]), Results)
