import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mask2dit import Mask2DiTPipeline
from mask2dit.inference.config import InferenceConfig, ParallelConfig
from mask2dit.inference.run import generate
from mask2dit.pipelines.parallel import check_parallel, check_processes, local_device
from mask2dit.pipelines.story import decode_scene

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/cogvideox_fun/predict_multi_scene_t2v_mask2dit.py"
STORY = {
    "model": str(ROOT / "models/storyworld"),
    "prompts": [
        f"Actor1 (green triangle, wearing a hat) {action} the beach."
        for action in ("moves right along", "moves left along", "stands still on")
    ],
    "window": 2,
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "sampler": "dpm",
    "num_inference_steps": 3,
    "guidance_scale": 2.0,
    "dtype": "float32",
    "preview_every": 2,
    "name": "story",
}


def torchrun(num_processes: int, save_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs the example script on several processes."""
    settings = {**STORY, "save_path": save_path}
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"),
            *(str(SCRIPT), str(ROOT / "configs/inference/fixed_scene_small.yaml")),
            *(f"{key}={value}" for key, value in settings.items()),
            "parallel.cfg=2",
            f"parallel.ulysses={num_processes // 2}",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{save_path}:{ROOT}", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_that_torchrun_starts_write_the_video_of_one(tmp_path, num_processes):
    result = torchrun(num_processes, tmp_path / "together")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Wrote ") == 1
    generate(InferenceConfig(**STORY, save_path=str(tmp_path / "alone")))
    together, alone = (
        {path.relative_to(tmp_path / folder) for path in (tmp_path / folder).rglob("*")}
        for folder in ("together", "alone")
    )
    assert {path for path in together if "scenes" not in path.parts} == {
        path for path in alone if "scenes" not in path.parts
    }
    # Pixels before the codec, which may turn a difference of 1 into a larger one.
    pipe = Mask2DiTPipeline.from_pretrained(STORY["model"])
    for number in (1, 2, 3):
        first, second = (
            decode_scene(pipe, load_file(tmp_path / folder / f"story/scene_{number}.safetensors")["latents"]).astype(
                int
            )
            for folder in ("together", "alone")
        )
        assert first.std() > 10 and np.abs(first - second).max() <= 1


@pytest.mark.slow
def test_a_process_that_checks_late_finds_the_name_of_the_run_free(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, time\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import mask2dit.inference.run as run\n"
        "    check = run.check_name\n"
        "    def check_late(config):\n"
        "        end = time.time() + 4\n"
        "        while time.time() < end and not (pathlib.Path(config.save_path) / 'story').exists():\n"
        "            time.sleep(0.05)\n"
        "        check(config)\n"
        "    run.check_name = check_late\n"
    )
    result = torchrun(2, tmp_path / "videos", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "videos/story.mp4").is_file()


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_sentence_and_leaves_no_half_written_file(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import mask2dit.pipelines.parallel as parallel\n"
        "    parallel.Processes.decode = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = torchrun(2, tmp_path)
    assert result.returncode != 0
    assert [line for line in result.stderr.splitlines() if line.startswith("error:")] == [
        "error: another process of this run was killed, perhaps for its memory, or all were stopped: there is no video, but "
        "the next run reuses finished scenes"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"scenes", "sitecustomize.py"}


def test_numbers_of_processes_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"parallel.cfg=2 .* need 4 processes, but there is 1: .*--nproc-per-node=4"):
        check_processes(2, 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"need 1 processes, but there are 3: .* product is 3"):
        check_processes(1, 1)
    with pytest.raises(ValueError, match=r"30 attention heads .* 3 or 5"):
        check_parallel(1, 4, 30, guidance_scale=6.0, memory="full")
    with pytest.raises(ValueError, match=r"guidance_scale=1.0 has only one"):
        check_parallel(2, 1, 30, guidance_scale=1.0, memory="full")
    with pytest.raises(ValueError, match=r"memory=sequential_offload .* group_offload"):
        check_parallel(2, 1, 30, guidance_scale=6.0, memory="sequential_offload")
    with pytest.raises(ValueError, match=r"parallel.cfg=3"):
        ParallelConfig(cfg=3)


def test_each_process_has_its_own_gpu(monkeypatch):
    assert local_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda:0 is one GPU"):
        local_device(torch.device("cuda", 0))
