"""The script that trains the small world's model: which stages run, in which order, and what is left alone."""

import pytest

# In place of Python: notes what it is asked to do, and leaves behind what that stage leaves.
STUB = """\
#!/usr/bin/env bash
echo "$*" >> calls
[ -f fail ] && [[ "$*" == *"$(cat fail)"* ]] && { mkdir -p outputs/storyworld/sft/checkpoint-00000500; exit 75; }
case "$2" in
  mask2dit.storyworld.films) case "$*" in
    *casts*) mkdir -p datasets/storyworld/casts; touch datasets/storyworld/casts/sft.json ;;
    *unnamed*) mkdir -p datasets/storyworld/unnamed; touch datasets/storyworld/unnamed/sft.json ;;
    *) mkdir -p datasets/storyworld; touch datasets/storyworld/held_out.json ;;
  esac ;;
  mask2dit.storyworld.vae) mkdir -p outputs/storyworld/vae/vae ;;
  mask2dit.storyworld.text) mkdir -p outputs/storyworld/text/text_encoder ;;
  mask2dit.storyworld.build) mkdir -p outputs/storyworld/model ;;
  mask2dit.training.launch) mkdir -p "outputs/storyworld/$(basename "$6" .yaml)/model" ;;
esac
"""


@pytest.fixture
def train_all(on_a_stub, tmp_path):
    """Runs the script on a stub. Returns the exit status and what was called."""

    def start(stop_at=None):
        (tmp_path / "fail").unlink(missing_ok=True)
        if stop_at:
            (tmp_path / "fail").write_text(stop_at)
        return on_a_stub("train_all.sh", STUB)

    return start


def test_all_stages_run_in_order(train_all):
    status, calls = train_all()

    assert status == 0
    assert [call.split()[1].removeprefix("mask2dit.") for call in calls] == [
        "storyworld.films",
        "storyworld.vae",
        "storyworld.text",
        "storyworld.build",
        "data.cache",
        "data.cache",
        "training.launch",
        "training.launch",
        "storyworld.films",
        "data.cache",
        "training.launch",
        "storyworld.films",
        "data.cache",
        "training.launch",
        "storyworld.build",
    ]
    assert "configs/storyworld/pretrain.yaml resume=auto" in calls[6]
    assert "trained=outputs/storyworld/casts/model output=models/storyworld" in calls[14]


def test_a_second_run_only_looks_for_missing_latents_and_writes_the_result(train_all):
    train_all()
    _, calls = train_all()

    assert [call.split()[1] for call in calls] == ["mask2dit.data.cache"] * 4 + ["mask2dit.storyworld.build"]


def test_a_stopped_stage_ends_the_script_and_is_resumed_by_the_next_run(train_all):
    status, calls = train_all(stop_at="sft.yaml")
    assert status == 75
    assert "sft.yaml" in calls[-1]

    status, calls = train_all()
    assert status == 0
    assert "configs/storyworld/sft.yaml resume=auto" in calls[2]
