import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mask2dit.pipelines.events import Cancelled, PreviewMade, SceneStarted, StepFinished
from mask2dit.pipelines.story import (
    ContextRule,
    SceneStore,
    _window_seed,
    generate_story,
    nearest_num_frames,
    plan_windows,
    story_windows,
)

PROMPTS = ["a fox", "a lake", "a hut", "the moon", "morning"]
SMALL = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}


def tell(pipe, prompts=PROMPTS, **options):
    return list(generate_story(pipe, prompts, **{"window": 3, **SMALL, **options}))


@pytest.mark.parametrize(
    "num_scenes, given, window, expected",
    [
        (3, [], None, [((0, 3), [0, 1, 2])]),
        (3, [0, 1], None, [((0, 3), [2])]),
        (3, [0], 3, [((0, 3), [1, 2])]),
        (5, [], 3, [((0, 3), [0, 1, 2]), ((1, 4), [3]), ((2, 5), [4])]),
        (6, [0, 1, 2, 3], 3, [((2, 5), [4]), ((3, 6), [5])]),
        (2, [], 3, [((0, 2), [0, 1])]),
        (3, [], 1, [((0, 1), [0]), ((1, 2), [1]), ((2, 3), [2])]),
    ],
)
def test_each_window_continues_from_the_last_scenes_that_fit(num_scenes, given, window, expected):
    windows = story_windows(num_scenes, given, window)
    assert windows == [(tuple(range(*scenes)), tuple(new)) for scenes, new in expected]


@pytest.mark.parametrize(
    "num_scenes, missing, window, expected",
    [
        (3, {1}, None, [((0, 3), [1])]),
        (3, {0, 2}, None, [((0, 3), [0, 2])]),
        (9, {2}, 3, [((1, 4), [2])]),
        (9, {0}, 3, [((0, 3), [0])]),
        (9, {8}, 3, [((6, 9), [8])]),
        (9, {2, 3}, 3, [((0, 3), [2]), ((2, 5), [3])]),
        (9, {2, 6}, 3, [((1, 4), [2]), ((5, 8), [6])]),
        (3, {1}, 1, [((1, 2), [1])]),
    ],
)
def test_a_scene_between_given_ones_sees_those_on_both_sides(num_scenes, missing, window, expected):
    windows = story_windows(num_scenes, set(range(num_scenes)) - missing, window)
    assert windows == [(tuple(range(*scenes)), tuple(new)) for scenes, new in expected]


def test_anchors_stay_in_every_window_and_the_latest_scenes_fill_it():
    windows = story_windows(6, (), 4, ContextRule("anchor", (2,)))
    assert windows == [((0, 1, 2, 3), (0, 1, 2, 3)), ((1, 2, 3, 4), (4,)), ((1, 3, 4, 5), (5,))]


def test_the_cast_rule_takes_the_scenes_that_share_most_actors_and_the_latest_one():
    actors = [frozenset(names) for names in ("ab", "a", "c", "c", "ab", "d")]
    windows = story_windows(6, (), 3, ContextRule("cast"), actors)
    assert [window.context for window in windows] == [[], [1, 2], [0, 3], [3, 4]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"context": "first"}, "context.*last, anchor, cast"),
        ({"context": "anchor", "anchors": []}, r"anchors=\[\]"),
        ({"context": "anchor", "anchors": [0]}, r"anchors=\[0\]"),
        ({"context": "anchor", "anchors": [1, 2]}, r"anchors=\[1, 2\].*window=4"),
    ],
)
def test_contexts_that_do_not_exist_or_fit_are_refused(small_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        generate_story(small_pipeline, PROMPTS, window=3, **SMALL, **options)


def test_scenes_depend_on_their_context_and_not_on_the_rule_that_found_it(small_pipeline, tmp_path):
    cast = ["Actor1 and Actor2", "Actor1", "a lake", "Actor1 and Actor2"]
    store = SceneStore(tmp_path, "weights")
    by_cast = tell(small_pipeline, cast, context="cast", store=store)
    made = {path.name for path in tmp_path.iterdir()}
    by_anchor = tell(small_pipeline, cast, context="anchor", store=store)
    assert {path.name for path in tmp_path.iterdir()} == made
    assert torch.equal(by_cast[3], by_anchor[3])
    assert torch.equal(by_cast[3], tell(small_pipeline, cast, context="anchor")[3])
    assert not torch.equal(by_cast[3], tell(small_pipeline, cast, context="last")[3])


def test_impossible_windows_are_refused():
    with pytest.raises(ValueError, match="window=0"):
        story_windows(3, (), 0)
    with pytest.raises(ValueError, match="3 context scenes leave nothing"):
        story_windows(3, (0, 1, 2), 3)


def test_a_story_that_fits_the_window_is_one_call_of_the_pipeline(small_pipeline, monkeypatch):
    calls = []
    call = type(small_pipeline).__call__
    monkeypatch.setattr(
        type(small_pipeline), "__call__", lambda *args, **kwargs: calls.append(kwargs) or call(*args, **kwargs)
    )
    scenes = tell(small_pipeline, PROMPTS[:3])
    assert len(calls) == 1 and calls[0]["context_latents"] is None
    assert [scene.shape for scene in scenes] == [(1, 3, 16, 8, 12)] * 3


def test_new_scenes_continue_from_the_latents_of_the_last_ones(small_pipeline, monkeypatch):
    calls = []
    call = type(small_pipeline).__call__

    def watch(self, prompt, **kwargs):
        calls.append((prompt, kwargs["context_latents"]))
        return call(self, prompt, **kwargs)

    monkeypatch.setattr(type(small_pipeline), "__call__", watch)
    scenes = tell(small_pipeline)
    assert [prompts for prompts, _ in calls] == [PROMPTS[:3], PROMPTS[1:4], PROMPTS[2:5]]
    assert torch.equal(calls[1][1], torch.cat(scenes[1:3], dim=1))
    assert torch.equal(calls[2][1], torch.cat(scenes[2:4], dim=1))


def test_a_scene_that_does_not_fit_on_the_disk_is_named_and_not_stored(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mask2dit.pipelines.story.save_file", full)
    store = SceneStore(tmp_path / "scenes", "weights")
    with pytest.raises(OSError, match=r"cannot write \S+scenes/\w+\.safetensors .*make room"):
        store.save(store.key("a"), torch.zeros(1))
    assert store.load(store.key("a"), (1,)) is None and not list((tmp_path / "scenes").iterdir())


def test_an_interrupted_story_goes_on_where_it_stopped_with_the_same_result(small_pipeline, tmp_path, monkeypatch):
    expected = tell(small_pipeline)
    store = SceneStore(tmp_path, "weights")
    interrupted = generate_story(small_pipeline, PROMPTS, window=3, **SMALL, store=store)
    for _ in range(4):
        next(interrupted)

    calls = []
    call = type(small_pipeline).__call__
    monkeypatch.setattr(
        type(small_pipeline), "__call__", lambda self, prompt, **kw: calls.append(prompt) or call(self, prompt, **kw)
    )
    resumed = tell(small_pipeline, store=SceneStore(tmp_path, "weights"))
    assert calls == [PROMPTS[2:5]]
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected))


@pytest.mark.parametrize(
    "change, made_again",
    [
        ({}, 0),
        ({"prompts": [*PROMPTS, "noon"]}, 1),
        ({"prompts": [*PROMPTS[:4], "noon"]}, 1),
        ({"prompts": ["a wolf", *PROMPTS[1:]]}, 3),
        ({"seed": 1}, 3),
        ({"num_inference_steps": 1}, 3),
        ({"negative_prompt": "blurry"}, 3),
        ({"context_guidance": True}, 2),  # of the three windows, the first has no context
        ({"identity": "other weights"}, 3),
    ],
)
def test_only_what_a_change_touches_is_made_again(small_pipeline, tmp_path, monkeypatch, change, made_again):
    tell(small_pipeline, store=SceneStore(tmp_path, "weights"))
    calls = []
    call = type(small_pipeline).__call__
    monkeypatch.setattr(
        type(small_pipeline), "__call__", lambda self, prompt, **kw: calls.append(prompt) or call(self, prompt, **kw)
    )
    store = SceneStore(tmp_path, change.pop("identity", "weights"))
    tell(small_pipeline, change.pop("prompts", PROMPTS), store=store, **change)
    assert len(calls) == made_again


def test_a_story_is_found_again_by_another_process(small_pipeline, tmp_path):
    # The scheduler leaves keys out, for which diffusers notes defaults in an order that differs between processes.
    small_pipeline.scheduler = CogVideoXDDIMScheduler.from_config({"snr_shift_scale": 1.0})
    defaults = small_pipeline.scheduler.config["_use_default_values"]
    assert len(set(defaults)) > 1
    for order in (sorted(defaults), sorted(defaults, reverse=True)):
        small_pipeline.scheduler.register_to_config(_use_default_values=order)
        tell(small_pipeline, PROMPTS[:1], store=SceneStore(tmp_path, "weights"))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_scene_is_made_again(small_pipeline, tmp_path, caplog):
    expected = tell(small_pipeline, PROMPTS[:1], store=SceneStore(tmp_path, "weights"))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    again = tell(small_pipeline, PROMPTS[:1], store=SceneStore(tmp_path, "weights"))
    assert torch.equal(again[0], expected[0])
    assert any("damaged" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("damage", ["nan", "another shape", "another name"])
def test_a_stored_scene_that_cannot_be_what_it_stands_for_is_named_and_made_again(
    small_pipeline, tmp_path, caplog, damage
):
    expected = tell(small_pipeline, PROMPTS[:1], store=SceneStore(tmp_path, "weights"))
    (path,) = tmp_path.iterdir()
    changed = {
        "nan": {"latents": torch.full_like(expected[0], torch.nan)},
        "another shape": {"latents": expected[0][:, :2].contiguous()},
        "another name": {"scene": expected[0]},
    }
    save_file(changed[damage], path)
    again = tell(small_pipeline, PROMPTS[:1], store=SceneStore(tmp_path, "weights"))
    assert torch.equal(again[0], expected[0])
    assert any(path.name in record.getMessage() for record in caplog.records)
    assert torch.equal(load_file(path)["latents"], expected[0])


def test_a_story_stops_at_the_first_window_that_is_not_finite_and_stores_nothing_of_it(
    small_pipeline, tmp_path, monkeypatch
):
    forward, calls = small_pipeline.transformer.forward, []

    def overflow(*args, **kwargs):
        calls.append(1)
        (noise,) = forward(*args, **kwargs)
        return (noise * torch.inf if len(calls) > SMALL["num_inference_steps"] else noise,)

    monkeypatch.setattr(small_pipeline.transformer, "forward", overflow)
    with pytest.raises(FloatingPointError, match=r"scene 4 of 5 .*bfloat16"):
        tell(small_pipeline, store=SceneStore(tmp_path, "weights"))
    assert len(calls) == 2 * SMALL["num_inference_steps"]
    assert len(list(tmp_path.iterdir())) == 3


def test_without_sizes_a_story_has_those_of_the_models_training(small_pipeline):
    (scene,) = generate_story(small_pipeline, PROMPTS[:1], num_inference_steps=1)
    assert scene.shape == (1, 3, 16, 8, 12)


def test_the_callers_progress_bar_settings_are_kept(small_pipeline):
    tell(small_pipeline, PROMPTS[:1])
    assert small_pipeline._progress_bar_config == {"disable": True}


def test_given_scenes_come_first_and_unchanged(small_pipeline):
    context = torch.randn(1, 6, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    scenes = tell(small_pipeline, PROMPTS[:3], context_latents=context)
    assert torch.equal(torch.cat(scenes[:2], dim=1), context)
    assert len(scenes) == 3


def test_given_scenes_may_be_anywhere_and_stay_unchanged(small_pipeline):
    first = tell(small_pipeline)
    given = {i: scene for i, scene in enumerate(first) if i != 2}
    again = tell(small_pipeline, given=given, seed=1)
    assert [torch.equal(a, b) for a, b in zip(first, again)] == [True, True, False, True, True]
    others = tell(small_pipeline, given={**given, 3: first[0]}, seed=1)
    assert not torch.equal(others[2], again[2])  # it sees the scene that follows
    with pytest.raises(ValueError, match=r"given\[3\].*\(1, 3, 16, 8, 12\)"):
        tell(small_pipeline, given={3: first[0][:, :2]})
    with pytest.raises(ValueError, match="scene 5 is given"):
        tell(small_pipeline, given={5: first[0]})


def test_a_scene_with_its_own_seed_keeps_its_noise_whatever_the_storys_seed(small_pipeline, monkeypatch):
    noises = []
    call = type(small_pipeline).__call__
    monkeypatch.setattr(
        type(small_pipeline), "__call__", lambda self, *a, **kw: noises.append(kw["latents"]) or call(self, *a, **kw)
    )
    for seed in (1, 2):
        tell(small_pipeline, PROMPTS[:2], seed=seed, seeds=[None, 5])
    tell(small_pipeline, PROMPTS[:2], seed=1, seeds=[None, 6])
    tell(small_pipeline, PROMPTS[:2], seed=1)
    (first, second), (other, same), (kept, _) = (noise.chunk(2, dim=1) for noise in noises[:3])
    assert torch.equal(first, kept) and noises[3] is None
    default = torch.randn(1, 6, *first.shape[2:], generator=torch.Generator().manual_seed(_window_seed(1, 0)))
    assert torch.equal(first, default[:, :3])  # a seed of one scene leaves the noise of the others as it was
    assert torch.equal(second, same) and not torch.equal(first, other)
    assert torch.equal(second, torch.randn(second.shape, generator=torch.Generator().manual_seed(5)))


def test_an_observer_sees_every_scene_and_step_with_previews(small_pipeline):
    events = []
    prompts, steps = PROMPTS[:3], {"window": 2, "num_inference_steps": 4}
    scenes = tell(small_pipeline, prompts, **steps, observer=events.append, preview_every=2)
    assert all(torch.equal(a, b) for a, b in zip(scenes, tell(small_pipeline, prompts, **steps)))
    assert [event.scene for event in events if isinstance(event, SceneStarted)] == [0, 1, 2]
    done = [(event.scenes, event.step, event.num_steps) for event in events if isinstance(event, StepFinished)]
    assert done == [((0, 1), step, 4) for step in (1, 2, 3, 4)] + [((2,), step, 4) for step in (1, 2, 3, 4)]
    previews = [event for event in events if isinstance(event, PreviewMade)]
    assert [(event.scene, event.step) for event in previews] == [(0, 2), (1, 2), (2, 2)]
    assert all(event.image.shape == (64, 96, 3) and event.image.dtype == np.uint8 for event in previews)


def test_an_observer_stops_the_story_and_finished_windows_stay(small_pipeline, tmp_path):
    def stop(event):
        if isinstance(event, SceneStarted) and event.scene == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        tell(small_pipeline, observer=stop, store=SceneStore(tmp_path, "weights"))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("wanted, carried", [(1, 1), (2, 5), (4, 5), (48, 49), (49, 49), (50, 49), (51, 53), (0.1, 1)])
def test_the_nearest_number_of_frames_is_one_that_the_vae_carries(small_pipeline, wanted, carried):
    assert nearest_num_frames(small_pipeline, wanted) == carried
    assert small_pipeline.video_shape(64, 96, carried, 1).frames == (carried,)


def test_seeds_decide_the_noise(small_pipeline):
    first, again, other = (tell(small_pipeline, PROMPTS[:2], seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_each_scene_keeps_its_own_length_and_negative_prompt(small_pipeline):
    scenes = tell(small_pipeline, PROMPTS[:4], num_frames=[9, 5, 13, 9], negative_prompt=["a", "b", "c", "d"])
    assert [scene.shape[1] for scene in scenes] == [3, 2, 4, 3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"height": 72}, "height=72"),
        ({"num_frames": [9, 9]}, "2 entries for 5 scenes"),
        ({"negative_prompt": ["a", "b"]}, "2 entries for 5 scenes"),
        ({"seeds": [1, 2]}, "seeds has 2 entries for 5 scenes"),
        ({"window": 0}, "window=0"),
        ({"context_latents": torch.zeros(1, 4, 16, 8, 12)}, "a whole number of scenes"),
        ({"context_latents": torch.zeros(2, 6, 16, 8, 12)}, r"\(1, 6, 16, 8, 12\).*\(2, 6, 16, 8, 12\)"),
        ({"context_latents": torch.zeros(1, 6, 16, 8, 12), "window": 1}, "use window=2"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ],
)
def test_bad_input_is_refused_at_the_call_and_not_at_the_first_scene(small_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        generate_story(small_pipeline, PROMPTS, **{"window": 3, **SMALL, **options})


def test_prompts_that_are_one_text_are_refused(small_pipeline):
    with pytest.raises(ValueError, match="list with one text for every scene"):
        generate_story(small_pipeline, "a fox", **SMALL)


def test_a_window_that_the_positions_cannot_carry_is_refused(make_pipeline):
    pipe = make_pipeline(use_rotary_positional_embeddings=False)  # sin-cos: at most 3 latent frames a scene
    with pytest.raises(ValueError, match="sin-cos positions"):
        plan_windows(pipe, PROMPTS, (), 3, 64, 96, 13)


def test_the_context_cache_works_in_windows_with_context_and_is_part_of_their_scenes_keys(
    small_pipeline, tmp_path, monkeypatch
):
    """The first window has no context, so its scenes are those of any refresh."""
    calls = []
    call = type(small_pipeline).__call__
    monkeypatch.setattr(
        type(small_pipeline),
        "__call__",
        lambda *args, **kwargs: calls.append(kwargs["context_refresh"]) or call(*args, **kwargs),
    )
    store = SceneStore(tmp_path / "scenes", "weights")
    exact = tell(small_pipeline, PROMPTS[:4], store=store)
    cached = tell(small_pipeline, PROMPTS[:4], store=store, context_refresh=2)
    assert calls == [1, 1, 2]
    assert all(torch.equal(*scenes) for scenes in zip(exact[:3], cached))
    assert not torch.equal(exact[3], cached[3])
    calls.clear()
    again = tell(small_pipeline, PROMPTS[:4], store=store, context_refresh=2, context_cache_device="cpu")
    assert torch.equal(again[3], cached[3]) and not calls
    tell(small_pipeline, PROMPTS[:4], store=store, context_refresh=2, context_cache_dtype="fp8")
    assert calls == [2]


def test_a_context_cache_without_context_is_refused(small_pipeline):
    with pytest.raises(ValueError, match="context_refresh=2"):
        generate_story(small_pipeline, PROMPTS[:3], window=3, **SMALL, context_refresh=2)
