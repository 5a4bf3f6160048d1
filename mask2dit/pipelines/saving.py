"""Writing model folders in the layout of released ones."""

import json
from pathlib import Path

from diffusers import CogVideoXDDIMScheduler

from mask2dit.device import name_cpu_to_deepspeed
from mask2dit.files import apply_umask
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

SPIECE = "spiece.model"


def save_pipeline(pipe: Mask2DiTPipeline, folder: Path, spiece: Path) -> None:
    """Writes all parts in diffusers' layout, each in its dtype, with `spiece` as the tokenizer.

    Released folders hold `spiece.model`. transformers would write another form of the tokenizer and then prefer it, so
    only `spiece.model` is written, and the folder is read in the same way.
    """
    name_cpu_to_deepspeed()
    contents = spiece.read_bytes()
    pipe.save_pretrained(folder)
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer" / SPIECE).write_bytes(contents)
    for file in folder.glob("*/config.json"):  # diffusers adds the path that a part was loaded from
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    apply_umask(folder)


def published_scheduler() -> CogVideoXDDIMScheduler:
    """Returns a scheduler with the noise schedule of CogVideoX-5B, which the method uses."""
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
