"""The scripts that measure the small world's model: which stories they ask for."""

STUB = """\
#!/usr/bin/env bash
echo "$*" >> calls
"""


def test_both_splits_are_measured_on_stories_that_nothing_was_chosen_by(on_a_stub):
    status, calls = on_a_stub("evaluate.sh", STUB, "model=elsewhere")

    assert status == 0
    *trials, report = calls
    assert report == "-m mask2dit.storyworld.report"
    for split in ("train", "held_out"):
        names = ["fixed", "no_context", "extension", "extension_context", "sliding", "sliding_context", "middle"]
        names += ["middle_context", "fixed_v1"]
        outputs = [f"output_dir=outputs/storyworld/trials/{split}/{name}" for name in names]
        of_split = [call for call in trials if f"split={split} " in call]
        assert [next(part for part in call.split() if part.startswith("output_dir")) for call in of_split] == outputs
        assert all(
            "stories=reporting num_stories=200" in call and call.endswith("model=elsewhere") for call in of_split
        )
        with_interval = ["guidance_interval=[250,1000]" in call for call in of_split]
        assert with_interval == [False, False] + [True] * 6 + [False]
        with_context = ["context_guidance=true" in call for call in of_split]
        assert with_context == [name.endswith("_context") and name != "no_context" for name in names]


def test_samplers_are_chosen_by_other_stories_than_those_reported(on_a_stub):
    status, calls = on_a_stub("steps.sh", STUB)

    assert status == 0 and len(calls) == 20
    assert "sampler=ddim num_inference_steps=4" in calls[0] and "sampler=dpm num_inference_steps=50" in calls[11]
    assert "guidance_interval=[0,500]" in calls[12] and "guidance_scale=4" in calls[18]
    assert calls[19] == "-m mask2dit.storyworld.report"
    assert not any("reporting" in call for call in calls)
