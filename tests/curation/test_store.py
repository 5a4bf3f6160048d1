import dataclasses
from dataclasses import dataclass

import pytest

from mask2dit.curation.store import Dropped, Entry, Workspace, kept


@dataclass(frozen=True, kw_only=True)
class Length(Entry):
    characters: int


def entries(*names):
    return [Entry(id=name, source=name, key=name) for name in names]


class Stage:
    """Measures names and drops those of one letter; keeps what it was asked for, and may fail at one."""

    def __init__(self, fails_at=None):
        self.seen = []
        self.fails_at = fails_at

    def __call__(self, missing):
        for entry in missing:
            if entry.id == self.fails_at:
                raise OSError("the disk is full")
            self.seen.append(entry.id)
            if len(entry.id) == 1:
                yield entry, [Dropped(id=entry.id, source=entry.source, rule="too_short", why="one letter")]
            else:
                yield entry, [Length(id=entry.id, source=entry.source, characters=len(entry.id))]


def run(folder, names, stage, settings=None, shard="0/1", stages=("measure",)):
    workspace = Workspace(folder, shard, stages)
    return workspace, workspace.run("measure", Length, entries(*names), settings or {}, stage)


def test_results_come_in_the_order_of_the_entries_and_are_counted(tmp_path):
    workspace, results = run(tmp_path, ["abc", "d", "ef"], Stage())
    assert [result.id for result in results] == ["abc", "d", "ef"]
    assert [result.characters for result in kept(results)] == [3, 2]
    assert workspace.funnel["measure"] == {"in": 3, "kept": 2, "dropped": {"too_short": 1}, "not done": 0}


def test_a_second_run_does_only_what_is_missing_and_finds_the_same(tmp_path):
    _, first = run(tmp_path, ["abc", "d"], Stage())
    _, second = run(tmp_path, ["ef", "abc", "d"], stage := Stage())
    assert stage.seen == ["ef"]
    assert second[1:] == first


def test_other_settings_start_anew_and_the_old_ones_are_found_again(tmp_path):
    _, first = run(tmp_path, ["abc"], Stage(), {"limit": 1})
    run(tmp_path, ["abc"], stage := Stage(), {"limit": 2})
    assert stage.seen == ["abc"]
    _, again = run(tmp_path, ["abc"], stage := Stage(), {"limit": 1})
    assert stage.seen == [] and again == first


def test_what_other_settings_leave_the_same_is_not_worked_on_again(tmp_path):
    _, first = run(tmp_path, ["abc", "d"], Stage(), {"limit": 1})
    _, other = run(tmp_path, ["abc", "d"], Stage(), {"limit": 2})
    assert [entry.key for entry in other] == [entry.key for entry in first]
    _, longer = run(tmp_path / "other", ["abcd"], Stage())
    assert longer[0].key not in [entry.key for entry in first]


def test_a_field_that_is_not_in_the_key_can_change_alone(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Noted(Length):
        not_in_key = ("note",)
        note: str

    def noted(note, characters):
        def stage(missing):
            for entry in missing:
                yield entry, [Noted(id=entry.id, source=entry.source, characters=characters, note=note)]

        workspace = Workspace(tmp_path, stages=("measure",))
        [result] = workspace.run("measure", Noted, entries("abc"), [note, characters], stage)
        assert result.note == note
        return result.key

    assert noted("one", 3) == noted("two", 3) != noted("one", 4)


def test_results_that_have_to_be_made_again_are(tmp_path):
    run(tmp_path, ["abc", "defg"], Stage())
    workspace = Workspace(tmp_path, stages=("measure",))
    results = workspace.run(
        "measure", Length, entries("abc", "defg"), {}, stage := Stage(), lambda result: result.characters == 4
    )
    assert stage.seen == ["defg"] and [result.characters for result in results] == [3, 4]


def test_names_that_are_not_utf_8_are_kept(tmp_path):
    _, first = run(tmp_path, ["caf\udce9"], Stage())
    _, second = run(tmp_path, ["caf\udce9"], stage := Stage())
    assert stage.seen == [] and first == second


def test_an_interruption_loses_only_the_entry_in_work(tmp_path):
    with pytest.raises(OSError, match="disk is full"):
        run(tmp_path, ["abc", "def", "ghi"], Stage(fails_at="def"))
    _, results = run(tmp_path, ["abc", "def", "ghi"], stage := Stage())
    assert stage.seen == ["def", "ghi"]
    assert [result.id for result in results] == ["abc", "def", "ghi"]


def test_a_line_cut_short_is_done_again(tmp_path):
    run(tmp_path, ["abc", "def"], Stage())
    path = tmp_path / "measure.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    run(tmp_path, ["abc", "def"], stage := Stage())
    assert stage.seen == ["def"]
    assert len(path.read_text().splitlines()) == 2
    run(tmp_path, ["abc", "def"], stage := Stage())
    assert stage.seen == []


def test_a_damaged_line_is_named(tmp_path):
    run(tmp_path, ["abc"], Stage())
    (tmp_path / "measure.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"measure\.jsonl, line 1 is damaged"):
        run(tmp_path, ["abc"], Stage())


def test_parts_share_the_films_and_the_whole_finds_all_of_them(tmp_path):
    names = [f"film {i}" for i in range(12)]
    parts = [[name for name in names if Workspace(tmp_path, f"{i}/3").is_mine(name)] for i in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(names) and all(parts)
    for i, part in enumerate(parts):
        run(tmp_path, part, Stage(), shard=f"{i}/3")
    _, results = run(tmp_path, names, stage := Stage())
    assert stage.seen == [] and [result.id for result in results] == names


def test_a_stage_that_is_not_asked_for_gives_what_is_there(tmp_path):
    run(tmp_path, ["abc"], Stage())
    workspace, results = run(tmp_path, ["abc", "def"], stage := Stage(), stages=("other",))
    assert stage.seen == [] and [result.id for result in results] == ["abc"]
    assert workspace.funnel["measure"]["not done"] == 1


def test_keys_follow_what_an_entry_was_made_from(tmp_path):
    _, [first] = run(tmp_path, ["abc"], Stage())
    workspace = Workspace(tmp_path, stages=("measure",))
    changed = dataclasses.replace(entries("abc")[0], key="another file")
    [second] = workspace.run("measure", Length, [changed], {}, Stage())
    assert second.key != first.key
