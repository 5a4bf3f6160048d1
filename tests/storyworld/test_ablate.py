"""The script of the ablations: which runs there are, what each starts from and how long it takes."""

from pathlib import Path

import pytest

from mask2dit.storyworld.report import ABLATIONS

RUNS = "outputs/storyworld/ablations"

# In place of Python: notes what it is asked to do, and leaves behind the model that a run exports.
STUB = """\
#!/usr/bin/env bash
echo "$*" >> calls
[[ "$2" == mask2dit.training.launch ]] && mkdir -p "$(sed 's/.*output_dir=\\([^ ]*\\).*/\\1/' <<< "$*")/model"
exit 0
"""


@pytest.fixture
def ablate(on_a_stub):
    """Makes a table on a stub. Returns what was trained, by name, and the trials' folders."""

    def start(table):
        status, calls = on_a_stub("ablate.sh", STUB, table)
        assert status == 0
        trained, tried = {}, []
        for call in calls:
            words = call.split()
            values = dict(word.split("=", 1) for word in words if "=" in word)  # the last of a key counts
            if words[1] == "mask2dit.training.launch":
                trained[Path(values["output_dir"]).name] = values
            if words[1] == "mask2dit.storyworld.trial":
                tried.append(values["output_dir"])
        return trained, tried

    return start


@pytest.mark.parametrize("table", ABLATIONS)
def test_every_row_has_its_stories_and_as_many_steps_as_the_others(ablate, table):
    trained, tried = ablate(table)

    rows = [row.run for row in ABLATIONS[table]]
    assert sorted(tried) == sorted(f"{RUNS}/{row}/trials/{task}" for row in rows for task in ("fixed", "extension"))
    steps = set()
    for row in rows:
        total, run = 0, row
        while run != "base":
            total += int(trained[run]["max_steps"])
            run = Path(trained[run]["model"]).parent.name
        assert int(trained[row]["decay_steps"]) > 0 == int(trained["base"]["decay_steps"])
        steps.add(total)
    assert len(steps) == 1


def test_the_rows_differ_in_what_their_table_is_about(ablate):
    variants, _ = ablate("variants")
    assert {name: run["mask_variant"] for name, run in variants.items() if name.startswith("pretraining_")} == {
        f"pretraining_{variant}": variant for variant in ("v1", "v2", "v3", "v4", "v5")
    }
    thresholds, _ = ablate("thresholds")
    manifests = {thresholds[row.run]["data.manifest"] for row in ABLATIONS["thresholds"]}
    assert len(manifests) == 4 and all("drifting" in manifest for manifest in manifests)
    conditional, _ = ablate("conditional")
    assert conditional["unconditional"]["conditional_probability"] == "0"


def test_what_is_trained_is_not_trained_again(ablate):
    ablate("conditional")
    trained, tried = ablate("stages")
    assert sorted(trained) == ["pretraining_only", "tuning_only"]
    assert len(tried) == 6


def test_a_table_that_there_is_not_is_refused_before_anything_runs(on_a_stub):
    assert on_a_stub("ablate.sh", STUB, "masks") == (2, [])
    assert on_a_stub("ablate.sh", STUB) == (2, [])
