import errno
import json
import os
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from mask2dit.inference import output, run
from mask2dit.inference.config import InferenceConfig, LoRAConfig
from mask2dit.inference.run import generate
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.untrained import MARKER
from mask2dit.video.reading import open_video
from mask2dit.video.writing import write_video

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples/cogvideox_fun"


def test_a_run_writes_video_contact_sheet_and_record(config):
    video_path = generate(config())
    video = open_video(video_path)
    assert (video.num_frames, video.height, video.width, video.fps) == (18, 64, 96, 8)
    large = open_video(video_path.with_stem("00001_4x"))
    assert (large.num_frames, large.height, large.width, large.fps) == (18, 256, 384, 8)
    pixels, blocks = video.read([7]).float(), large.read([7]).float().unflatten(1, (64, 4)).unflatten(3, (96, 4))
    assert (blocks.mean((2, 4)) - pixels).abs().mean() < 8  # of 255: both lose colour detail in H.264
    sheet = Image.open(video_path.with_suffix(".png"))
    assert sheet.width > 6 * 96
    record = json.loads(video_path.with_suffix(".json").read_text())
    assert record["config"] == asdict(config())
    assert [scene["frames"] for scene in record["scenes"]] == [[0, 9], [9, 18]]
    assert [scene["prompt"] for scene in record["scenes"]] == ["a fox", "a lake"]
    assert {"torch", "diffusers", "mask2dit"} <= record["versions"].keys()
    assert record["weights"] and record["mask_variant"] == "v2"
    assert record["scheduler"]["class"] == "CogVideoXDDIMScheduler"


def test_a_run_checks_its_model_and_fingerprints_its_weights_once(config, monkeypatch):
    calls = []
    skeleton, fingerprint = Mask2DiTPipeline.skeleton, run.fingerprint
    monkeypatch.setattr(
        Mask2DiTPipeline, "skeleton", lambda *args, **kw: calls.append("skeleton") or skeleton(*args, **kw)
    )
    monkeypatch.setattr(run, "fingerprint", lambda path: calls.append("fingerprint") or fingerprint(path))
    generate(config())
    assert calls == ["skeleton", "fingerprint"]


def test_runs_are_numbered_and_never_overwrite(config):
    assert [generate(config()).name for _ in range(2)] == ["00001.mp4", "00002.mp4"]
    assert generate(config(name="fox")).name == "fox.mp4"
    with pytest.raises(FileExistsError, match=r"fox\.mp4 is in"):
        generate(config(name="fox"))


def test_two_runs_at_the_same_time_take_different_names_and_a_stopped_one_leaves_nothing(
    config, tmp_path, monkeypatch
):
    write_image, others = output.write_image, []

    def write_while_another_run_begins_and_ends(path, image):
        write_image(path, image)
        if not others:
            others.append(None)
            others[0] = generate(config(prompts=["a bear", "a wood"])).name

    monkeypatch.setattr(output, "write_image", write_while_another_run_begins_and_ends)
    assert generate(config()).name == "00001.mp4" and others == ["00002.mp4"]
    record = json.loads((tmp_path / "out/00001.json").read_text())
    assert record["config"]["prompts"] == ["a fox", "a lake"]

    def write_and_look(path, frames, fps):
        assert not (tmp_path / "out/00003.mp4").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_video", write_and_look)
    with pytest.raises(KeyboardInterrupt):
        generate(config())
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"00001", "00001_4x", "00002", "00002_4x", "scenes"}


@pytest.mark.parametrize("writer", ["write_video", "save_latents", "write_image", "write_text", "join_videos"])
def test_a_full_disk_leaves_no_part_of_the_result_and_the_run_goes_on_later(config, tmp_path, monkeypatch, writer):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(output, writer, full)
        with pytest.raises(OSError, match=r"cannot write \S+out .*make room"):
            generate(config())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scenes"]
    assert generate(config()).name == "00001.mp4"


def test_the_same_configuration_makes_the_same_video(config, tmp_path):
    first = generate(config(save_path=str(tmp_path / "a")))
    second = generate(config(save_path=str(tmp_path / "b")))
    assert first.read_bytes() == second.read_bytes()


def test_a_story_continues_from_videos_and_records_them(config, clip, monkeypatch):
    story = config(prompts=["a fox", "a lake", "a hut", "night"], context_videos=[clip, clip], window=3)
    video_path = generate(story)
    assert open_video(video_path).num_frames == 36
    record = json.loads(video_path.with_suffix(".json").read_text())
    assert [scene["context"] and scene["context"]["path"] for scene in record["scenes"]] == [clip, clip, None, None]
    assert [scene["continues_from"] for scene in record["scenes"]] == [None, None, [1, 2], [2, 3]]

    monkeypatch.setattr(run.Mask2DiTPipeline, "__call__", lambda *a, **k: pytest.fail("made a scene again"))
    monkeypatch.setattr(run.Mask2DiTPipeline, "encode_context", lambda *a, **k: pytest.fail("encoded again"))
    assert generate(story).read_bytes() == video_path.read_bytes()


def test_given_scenes_come_back_as_the_frames_that_the_model_saw(config, tmp_path):
    rng = np.random.default_rng(0)
    frames = np.kron(rng.integers(256, size=(9, 8, 12, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    write_video(tmp_path / "given.mp4", frames, fps=8)
    video_path = generate(config(context_videos=[str(tmp_path / "given.mp4")]))
    shown, source = (
        open_video(video_path).read(range(9)).float(),
        open_video(tmp_path / "given.mp4").read(range(9)).float(),
    )
    assert (shown - source).abs().mean() < 3  # what H.264 loses twice; the random VAE's copy is unlike it altogether
    record = json.loads(video_path.with_suffix(".json").read_text())
    assert record["scenes"][0]["context"]["indices"] == list(range(9))


def test_given_scenes_are_marked_in_the_contact_sheet(config, clip, monkeypatch):
    sheets = []
    draw = output.contact_sheet
    monkeypatch.setattr(output, "contact_sheet", lambda *args, **kw: sheets.append(kw) or draw(*args, **kw))
    generate(config(context_videos=[clip]))
    assert list(sheets[0]["given"]) == [0]


def test_a_video_that_was_generated_here_gives_all_scenes_of_its_record(config):
    first = generate(config())
    video_path = generate(config(prompts=["a fox", "a lake", "a hut"], context_videos=[str(first)], window=3))
    record = json.loads(video_path.with_suffix(".json").read_text())
    contexts = [scene["context"] and scene["context"]["indices"] for scene in record["scenes"]]
    assert contexts == [list(range(9)), list(range(9, 18)), None]
    shown, source = open_video(video_path).read(range(18)).float(), open_video(first).read(range(18)).float()
    assert (shown - source).abs().mean() < 6
    with pytest.raises(ValueError, match="2 context scenes leave nothing"):
        generate(config(context_videos=[str(first)]))


@pytest.mark.parametrize("text", ["{", "[]", '{"scenes": [{"frames": [0, 4]}]}', '{"scenes": "none"}'])
def test_a_file_beside_a_context_video_that_is_not_its_record_is_told(config, clip, caplog, text):
    Path(clip).with_suffix(".json").write_text(text)
    generate(config(context_videos=[clip]))
    assert any("clip.json" in record.getMessage() for record in caplog.records)


def test_a_context_video_in_which_further_scenes_may_be_is_warned_of(config, tmp_path, caplog):
    write_video(tmp_path / "long.mp4", np.full((34, 64, 96, 3), 90, dtype=np.uint8), fps=8)
    generate(config(context_videos=[str(tmp_path / "long.mp4")]))
    (warning,) = [r.getMessage() for r in caplog.records if "long.mp4" in r.getMessage() and r.levelname == "WARNING"]
    assert "0 to 33" in warning and "4 to 28" in warning


def test_sampler_and_lora_change_the_video(config, tmp_path):
    pipe = run.load_pipeline(config(), "cpu")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path / "lora", transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    lora = LoRAConfig(path=str(tmp_path / "lora"), scale=4.0)
    changes = ({}, {"sampler": "dpm"}, {"lora": lora})
    videos = [generate(config(num_inference_steps=3, **change)).read_bytes() for change in changes]
    assert len(set(videos)) == 3


def test_an_untrained_model_is_built_where_it_is_missing_and_said_to_be_untrained(config, tmp_path, caplog):
    generate(config(model=str(tmp_path / "untrained-new"), build_untrained=True))
    assert (tmp_path / "untrained-new" / "transformer").is_dir()
    assert any("untrained" in record.getMessage() for record in caplog.records)


def test_an_untrained_model_never_takes_the_place_of_a_missing_trained_one(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="put the weights there"):
        generate(config(model=str(tmp_path / "Mask2DiT"), build_untrained=True))
    assert not (tmp_path / "Mask2DiT").exists()


def test_a_trained_model_is_not_called_untrained(config, small_model, tmp_path, caplog):
    shutil.copytree(small_model, tmp_path / "trained")
    (tmp_path / "trained" / MARKER).unlink()
    generate(config(model=str(tmp_path / "trained"), build_untrained=True))
    assert not any("untrained" in record.getMessage() for record in caplog.records)


def test_scenes_are_not_taken_from_a_run_that_computed_otherwise(config):
    first, second = generate(config()), generate(config(memory="fp8"))
    assert first.read_bytes() != second.read_bytes()


def test_tiling_changes_no_size_of_the_small_worlds_model(tmp_path):
    prompts = [
        f"Actor1 (green square, wearing a scarf) {action} on the beach." for action in ("jumps", "stands still")
    ]
    config = InferenceConfig(
        model=str(ROOT / "models/storyworld"),
        prompts=prompts,
        context_videos=[str(ROOT / "datasets/extension/small_1.mp4")],
        num_inference_steps=1,
        dtype="float32",
        device="cpu",
        vae_tiling=True,
        save_path=str(tmp_path),
    )
    video_path = generate(config)
    video = open_video(video_path)
    assert (video.num_frames, video.height, video.width) == (18, 64, 64)  # the model's, as none is named
    assert json.loads(video_path.with_suffix(".json").read_text())["config"]["height"] == 64


def truncated(path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    return path


BAD = {
    "no weights": ({"model": "models/nowhere"}, "no model in '.*models/nowhere'.*put the weights there.*fixed_scene_small"),
    "a bad height": ({"height": 70}, "height=70 .* 64 or 80"),
    "bad frames": ({"num_frames": 10}, "num_frames=10 .* 9 or 13"),
    "an unknown memory mode": ({"memory": "tiny"}, "memory has to be one of full"),
    "offload without a GPU": ({"memory": "model_offload"}, "use full"),
    "an unknown variant": ({"mask_variant": "v6"}, "v1, v2, v3, v4, v5, but is 'v6'"),
    "an unknown device": ({"device": "gpu"}, "device has to be auto"),
    "a missing context video": ({"context_videos": ["nowhere.mp4"]}, "nowhere.mp4"),
    "more context than prompts": ({"context_videos": ["a", "b", "c"]}, "3 context scenes leave nothing"),
    "an empty window": ({"window": 0}, "window=0"),
    "an unknown attention backend": ({"attention_backend": "flesh"}, "attention_backend has to be one of .* but is 'flesh'"),
    "an attention backend for GPUs": ({"attention_backend": "flash"}, "flash needs a GPU: on a CPU use native"),
    "too many steps": ({"num_inference_steps": 2000}, "num_inference_steps=2000 has to be between 1 and 1000"),
    "a missing LoRA": ({"lora": LoRAConfig(path="nowhere")}, "no LoRA 'nowhere'"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_bad_input_ends_before_weights_are_read(config, monkeypatch, changes, message):
    monkeypatch.setattr(run, "load_pipeline", lambda *args: pytest.fail("weights were read"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate(config(**changes))


def test_a_corrupt_or_short_context_video_ends_before_weights_are_read(config, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_pipeline", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"clip\.mp4.*30.*49"):
        generate(config(context_videos=[clip], num_frames=49))
    with pytest.raises(ValueError, match=r"clip\.mp4"):
        generate(config(context_videos=[truncated(clip)]))


def test_a_lora_for_another_model_or_a_corrupt_one_ends_before_weights_are_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_pipeline", lambda *args: pytest.fail("weights were read"))
    path = tmp_path / "lora.safetensors"
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"has weights for unet\.down, not for this transformer"):
        generate(config(lora=LoRAConfig(path=str(path))))
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"lora\.safetensors.*fetch it again"):
        generate(config(lora=LoRAConfig(path=str(path))))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_ends_before_weights_are_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_pipeline", lambda *args: pytest.fail("weights were read"))
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        generate(config())


def test_a_failure_while_writing_leaves_no_half_video(config, monkeypatch):
    monkeypatch.setattr(run.Mask2DiTPipeline, "decode_latents", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(config())
    folder = Path(config().save_path)
    assert [path.name for path in folder.iterdir()] == ["scenes"]


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs an example script in this process. Returns its status and what it prints to stdout and stderr."""

    def run(name, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def small(tmp_path):
    return [f"save_path={tmp_path}/out", "num_inference_steps=1", "name=story"]


def test_the_fixed_scene_script_runs_its_small_configuration(run_script, tmp_path):
    status, _, errors = run_script(
        "predict_multi_scene_t2v_mask2dit.py",
        ROOT / "configs/inference/fixed_scene_small.yaml",
        *small(tmp_path),
    )
    assert status == 0, errors
    assert open_video(tmp_path / "out/story.mp4").num_frames == 27
    assert (tmp_path / "out/story.png").is_file()


def test_the_extension_script_runs_its_small_configuration(run_script, tmp_path):
    status, _, errors = run_script(
        "predict_autoregressive_scene_expansion_mask2dit.py",
        ROOT / "configs/inference/extension_small.yaml",
        *small(tmp_path),
    )
    assert status == 0, errors
    assert open_video(tmp_path / "out/story.mp4").num_frames == 36


@pytest.mark.parametrize(
    "script, small_config",
    [
        ("predict_multi_scene_t2v_mask2dit.py", "fixed_scene_small.yaml"),
        ("predict_autoregressive_scene_expansion_mask2dit.py", "extension_small.yaml"),
    ],
)
def test_without_weights_a_script_names_both_remedies(run_script, script, small_config, tmp_path):
    status, _, errors = run_script(script, f"model={tmp_path}/none")
    assert status == 1
    assert "put the weights there" in errors and small_config in errors


def test_the_small_worlds_model_refuses_prompts_that_it_does_not_know(run_script, tmp_path):
    status, _, errors = run_script(
        "predict_multi_scene_t2v_mask2dit.py",
        ROOT / "configs/inference/fixed_scene_small.yaml",
        *small(tmp_path),
        "prompts=[A cat sleeps.]",
    )
    assert status == 1
    assert "'A cat sleeps.' is outside the story world" in errors


def test_a_script_tells_an_unknown_key_and_its_usage(run_script):
    status, _, errors = run_script("predict_multi_scene_t2v_mask2dit.py", "promts=[a]")
    assert (status, errors) == (1, "error: promts=[a]: there is no key 'promts'; did you mean 'prompts'?\n")
    assert "fixed_scene.yaml" in run_script("predict_multi_scene_t2v_mask2dit.py", "--help")[1]
