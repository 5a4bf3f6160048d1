"""The settings of the example scripts. Imports nothing heavy, so that a mistake in them shows at once."""

from dataclasses import dataclass, field
from typing import Any

from mask2dit.config import DTYPES, SAMPLERS, check_at_least, check_choice, check_file_name, check_finite

CONTEXT_STARTS = ("center", "random")


@dataclass(kw_only=True)
class LoRAConfig:
    """Low-rank additions to the weights."""

    path: str | None = None
    """A LoRA of CogVideoX, file or folder, as diffusers, PEFT, ComfyUI, kohya or VideoX-Fun write it; null: none."""
    scale: float = 1.0
    """Factor of the LoRA's weights."""

    def __post_init__(self):
        check_finite("lora.scale", self.scale)


@dataclass(kw_only=True)
class SamplingConfig:
    """The model and how it generates: the keys that inference and evaluation share."""

    # The model
    model: str = "models/Mask2DiT"
    """Model folder in diffusers' layout: trained here, released by the authors, or plain CogVideoX."""
    build_untrained: bool = False
    """Build a small model with random weights in the model folder if it does not exist. Its name has to begin with
    "untrained"; its pictures mean nothing."""
    mask_variant: str | None = None
    """Mask variant: v1, v2, v3, v4 or v5; null: the one that the model was trained with."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    # The story
    negative_prompt: Any = ""
    """One negative prompt for all scenes, or a list with one per scene."""
    window: int | None = None
    """Scenes generated together; a longer story slides this window over its scenes. null: all at once."""
    height: int | None = None
    """Height in pixels; null: the model's, 480 for Mask²DiT-5B."""
    width: int | None = None
    """Width in pixels; null: the model's, 720 for Mask²DiT-5B."""
    num_frames: Any = None
    """Frames per scene: one number for all scenes, or a list with one per scene; null: the model's, 49 for
    Mask²DiT-5B."""

    # Sampling
    sampler: str = "ddim"
    """Sampler: ddim (published) or dpm."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 6.0
    """Weight of classifier-free guidance; 1 or less: no guidance."""
    use_dynamic_cfg: bool = False
    """Vary the guidance weight over the steps by the formula of diffusers' CogVideoX pipeline."""

    # The machine
    dtype: str = "bfloat16"
    """Data type of the weights: float32, bfloat16 or float16."""
    memory: str = "full"
    """Memory mode: full, model_offload, group_offload, sequential_offload or fp8; the table in the README compares
    them."""
    vae_tiling: bool = False
    """Decode frames in tiles: less memory, slower, faint seams possible."""
    attention_backend: str | None = None
    """Attention backend of diffusers, such as flash, sage or _native_cudnn; null: torch's own choice."""
    compile: bool = False
    """Compile the transformer's blocks: slow to start, then faster. Only with memory=full or memory=model_offload."""

    # The output
    fps: int = 8
    """Frames per second of the video."""

    def __post_init__(self):
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("dtype", self.dtype, DTYPES)
        if self.compile and self.memory in ("group_offload", "sequential_offload", "fp8"):
            raise ValueError(f"compile=true cannot be used with memory={self.memory}: use full or model_offload")
        for name in ("num_inference_steps", "fps"):
            check_at_least(name, getattr(self, name), 1)
        if self.fps > 1000:
            raise ValueError(f"fps={self.fps} has to be at most 1000 frames per second")
        check_finite("guidance_scale", self.guidance_scale)


@dataclass(kw_only=True)
class InferenceConfig(SamplingConfig):
    """What to generate and with which model. `configs/inference/*.yaml` hold values for all of it."""

    # The story
    prompts: list[str] = field(default_factory=list)
    """One prompt per scene, in order, including the given scenes."""
    context_videos: list[str] = field(default_factory=list)
    """Video files of the first scenes, which the other scenes continue. A file is one scene, unless it was generated
    here and its record (.json) is in the same folder: then it holds all scenes that the record names."""
    context_start: str = "center"
    """Frame range of a longer context video: center, or random (as published)."""
    sample_context: bool = False
    """Sample the VAE's posterior of the context, as published, instead of taking its mode."""
    noise_context: bool = False
    """Noise the context at timestep 0, as the published pipeline does; in training it is clean."""

    # Sampling
    seed: int = 42
    """Seed of the noise."""

    # The machine
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""

    # The output
    save_path: str = "samples/mask2dit"
    """Folder for the video, the contact sheet and the record, and for finished scenes of an interrupted story, which the
    next run reuses."""
    name: str | None = None
    """File name without suffix; null: the next free number."""

    def __post_init__(self):
        super().__post_init__()
        for text in self.prompts:
            if not isinstance(text, str):
                raise ValueError(
                    f"prompts has to hold texts, but one is {text!r}: put quotes around a text with a comma or colon"
                )
        if not self.prompts or not all(text.strip() for text in self.prompts):
            raise ValueError("prompts has to hold one text for every scene, but is empty or has an empty one")
        check_choice("context_start", self.context_start, CONTEXT_STARTS)
        if self.negative_prompt is None:  # negative_prompt= on the command line
            self.negative_prompt = ""
        texts = [self.negative_prompt] if isinstance(self.negative_prompt, str) else self.negative_prompt
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"negative_prompt has to be a text or a list of texts, but is {self.negative_prompt!r}")
        if texts is self.negative_prompt and len(texts) != len(self.prompts):
            raise ValueError(f"negative_prompt has {len(texts)} entries for {len(self.prompts)} prompts")
        counts = self.num_frames if isinstance(self.num_frames, list) else [self.num_frames]
        if self.num_frames is not None and not all(type(count) is int for count in counts):
            raise ValueError(f"num_frames has to be a number or a list of numbers, but is {self.num_frames!r}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} has to fit into 64 bits, as torch's generators need it")
        if self.name is not None:
            check_file_name("name", self.name, ".json")
