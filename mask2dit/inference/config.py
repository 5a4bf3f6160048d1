"""Settings of the example scripts. Imports nothing heavy, so that mistakes are reported at once."""

from dataclasses import dataclass, field
from types import NoneType
from typing import Any, ClassVar

from mask2dit.config import (
    CONTEXTS,
    DTYPES,
    QUANTIZATIONS,
    SAMPLERS,
    check_at_least,
    check_cache,
    check_choice,
    check_context_cache,
    check_file_name,
    check_finite,
    check_guidance_interval,
)

CONTEXT_STARTS = ("center", "random")
DEFAULT_SEED = 42


@dataclass(kw_only=True)
class LoRAConfig:
    """A LoRA that is added to the transformer's weights."""

    path: str | None = None
    """File, folder or name on the Hugging Face Hub of a CogVideoX LoRA in the form of diffusers, PEFT, ComfyUI, kohya or
    VideoX-Fun; null: none."""
    weight_name: str | None = None
    """File of the LoRA where the folder or the hub has several; null: the one with diffusers' or PEFT's name, or the only
    one."""
    revision: str | None = None
    """Branch, tag or commit of a LoRA of the Hugging Face Hub; null: its main branch."""
    scale: float = 1.0
    """Factor of the LoRA's weights."""

    def __post_init__(self):
        check_finite("lora.scale", self.scale)


@dataclass(kw_only=True)
class QuantizationConfig:
    """Components whose linear layers are stored in fewer bits."""

    transformer: str | None = None
    """Form of the transformer's weights: int8 or fp8 (torchao), bnb_int8 or nf4 (bitsandbytes, on a GPU); null: `dtype`."""
    text_encoder: str | None = None
    """Form of the text encoder's weights: int8, fp8, bnb_int8 or nf4; null: `dtype`."""

    def __post_init__(self):
        for name in ("transformer", "text_encoder"):
            if getattr(self, name) is not None:
                check_choice(f"quantization.{name}", getattr(self, name), QUANTIZATIONS)

    @property
    def components(self) -> dict[str, str]:
        """The forms of the components that are quantized."""
        forms = {name: getattr(self, name) for name in ("transformer", "text_encoder")}
        return {name: form for name, form in forms.items() if form is not None}


@dataclass(kw_only=True)
class SamplingConfig:
    """The model and its sampling: the keys that inference and evaluation share."""

    # The model
    model: str = "models/Mask2DiT"
    """Model folder in diffusers' layout, or a name on the Hugging Face Hub, such as qth/Mask2DiT: trained here, released by
    the authors, or plain CogVideoX."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hugging Face Hub; null: its main branch."""
    variant: str | None = None
    """Variant of the weights, such as fp16, where the model has several; null: the plain ones."""
    build_untrained: bool = False
    """Build a small model with random weights if the model folder does not exist. Its name has to begin with "untrained".
    Its videos are noise."""
    mask_variant: str | None = None
    """Mask variant: v1, v2, v3, v4 or v5; null: the variant that the model was trained with."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    # The story
    negative_prompt: Any = ""
    """One negative prompt for all scenes, or a list with one per scene."""
    window: int | None = None
    """Number of scenes generated together; in a longer story, this window slides over the scenes. null: all at once."""
    context: str = "last"
    """Earlier scenes that a sliding window continues from, besides the latest: last (the ones before it), anchor (the
    `anchors`) or cast (those that share most actors with the new scene)."""
    anchors: list[int] = field(default_factory=lambda: [1])
    """Numbers of the scenes, from 1, that context=anchor keeps in every window."""
    height: int | None = None
    """Height in pixels; null: the model's height, 480 for Mask²DiT-5B."""
    width: int | None = None
    """Width in pixels; null: the model's width, 720 for Mask²DiT-5B."""
    num_frames: Any = None
    """Frames per scene: one number for all scenes, or a list with one per scene; null: the model's number, 49 for
    Mask²DiT-5B."""

    # Sampling
    sampler: str = "ddim"
    """Sampler: ddim (published) or dpm."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 6.0
    """Scale of classifier-free guidance; 1 or less: no guidance."""
    use_dynamic_cfg: bool = False
    """Vary the guidance scale over the steps by the formula of diffusers' CogVideoX pipeline."""
    guidance_interval: Any = None
    """The lowest and the highest timestep that are guided, such as [100, 800]; other steps cost half. null: all."""
    context_guidance: bool = False
    """Compare with each scene alone in guidance where scenes are given, so that it strengthens consistency with them."""
    cache: str | None = None
    """Step cache: pyramid_attention, faster_cache, first_block, taylorseer, taylorseer_lite or mag_cache; null: none.
    docs/speed.md compares them."""
    cache_options: Any = None
    """Options of the step cache, such as {threshold: 0.2} for first_block; null: the preset's."""
    context_refresh: int = 1
    """Compute given scenes at the first and every k-th step alone, and attend to their kept keys and values between. 1 is
    exact. docs/speed.md compares values."""
    context_cache_device: str = "model"
    """Where keys and values of given scenes are kept: model (where the transformer computes) or cpu (main memory)."""
    context_cache_dtype: str = "auto"
    """Data type of kept keys and values: auto (the model's) or fp8, which halves their memory."""

    # The machine
    dtype: str = "bfloat16"
    """Data type of the weights: float32, bfloat16 or float16."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    memory: str = "full"
    """Memory mode: full, model_offload, group_offload, sequential_offload or fp8. The README has a table of them."""
    check_memory: bool = True
    """Refuse a memory mode that is predicted not to fit the GPU, or main memory without one; false: try it."""
    vae_tiling: bool = False
    """Decode frames in tiles, which takes less memory but is slower and may leave faint seams."""
    attention_backend: str | None = None
    """Attention backend of diffusers, such as flash, sage or _native_cudnn; null: torch's default."""
    compile: bool = False
    """Compile the transformer's blocks: slower to start, faster afterwards. Requires memory=full or memory=model_offload."""

    # The output
    fps: int = 8
    """Frames per second of the video."""

    def __post_init__(self):
        check_choice("context", self.context, CONTEXTS)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("dtype", self.dtype, DTYPES)
        if self.compile and self.memory in ("group_offload", "sequential_offload", "fp8"):
            raise ValueError(f"compile=true cannot be used with memory={self.memory}: use full or model_offload")
        for name in ("num_inference_steps", "fps"):
            check_at_least(name, getattr(self, name), 1)
        if self.fps > 1000:
            raise ValueError(f"fps={self.fps} has to be at most 1000 frames per second")
        check_finite("guidance_scale", self.guidance_scale)
        check_context_cache(self.context_refresh, self.context_cache_device, self.context_cache_dtype)
        if self.guidance_interval is not None and not isinstance(self.guidance_interval, (list, tuple)):
            raise ValueError(f"guidance_interval has to be two timesteps or null, but is {self.guidance_interval!r}")
        check_guidance_interval(self.guidance_interval)
        check_cache(self.cache)
        if self.cache_options is not None and not isinstance(self.cache_options, dict):
            raise ValueError(f"cache_options has to be options by name or null, but is {self.cache_options!r}")


@dataclass(kw_only=True)
class ParallelConfig:
    """Processes that make a video together. Start cfg * ulysses of them by torchrun; docs/parallelism.md describes both."""

    cfg: int = 1
    """Processes, 1 or 2, over which the two branches of guidance are divided."""
    ulysses: int = 1
    """Processes that share each forward pass; they have to divide the model's attention heads."""

    def __post_init__(self):
        if self.cfg not in (1, 2):
            raise ValueError(f"parallel.cfg={self.cfg} has to be 1 or 2, the number of branches of guidance")
        check_at_least("parallel.ulysses", self.ulysses, 1)


@dataclass(kw_only=True)
class InferenceConfig(SamplingConfig):
    """The story to generate, the model and the sampling. `configs/inference/*.yaml` are templates."""

    ALTERNATIVES: ClassVar = (("story",), ("prompts", "context_videos", "scene_mask", "scene_seeds"))

    # The story
    story: str | None = None
    """Story file (docs/stories.md), in place of prompts and context_videos. Its style, lengths, negative prompt and given
    scenes apply; its seed does unless seed is set. null: none."""
    prompts: list[str] = field(default_factory=list)
    """One prompt per scene, in order, including the given scenes."""
    context_videos: list[str] = field(default_factory=list)
    """Video files of the given scenes in order, from which the other scenes continue. A file is one scene. A video
    generated here, with its record (.json) in the same folder, gives all scenes of the record."""
    scene_mask: Any = None
    """One true or false per scene: false where context_videos give the scene. null: they give the first scenes."""
    scene_seeds: Any = None
    """One entry per scene: the seed of its initial noise, or null for noise that follows from seed. null: no scene has a
    seed of its own."""
    context_start: str = "center"
    """Frame range of a longer context video: center, or random (as published)."""
    sample_context: bool = False
    """Sample the VAE's posterior of the context, as published, instead of taking its mode."""
    noise_context: bool = False
    """Add noise to the context at timestep 0, as the published pipeline does; in training, the context is clean."""

    # One scene anew
    redo: list[int] = field(default_factory=list)
    """Scenes to make again, counted from 1, of the run whose record (.json) is the configuration file. All others are kept
    as they are and given, as far as the window reaches. Scenes that were added at the end are made too."""
    following: bool = field(default=False, metadata={"of_one_run": "redo"})
    """Also make the scenes again that follow those in redo."""
    record: str | None = field(default=None, metadata={"record_for": "redo"})
    """Record from which scenes are kept; null: the configuration file, where redo is on the command line. In lists with one
    entry per scene, scenes added at the end need none: they have no seed of their own, and the last scene's num_frames and
    negative_prompt."""

    prompt_cache: str | None = None
    """Folder that keeps the embeddings of prompts; the text encoder is loaded only if one is missing. null: no cache."""

    # Sampling
    seed: int | None = None
    """Seed of the noise; null: the story's, or 42."""
    count: int = 1
    """Number of videos, made with the seeds seed, seed + 1, …; a sheet compares them. With given scenes, above 1 for
    context_start=center alone."""

    # The machine
    dry_run: bool = False
    """Print the memory that each memory mode needs and the operations of the run, without reading weights."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    # The output
    save_path: str = "samples/mask2dit"
    """Folder for the video, the contact sheet, the record and finished scenes, which the next run reuses."""
    name: str | None = field(default=None, metadata={"of_one_run": None})
    """File name of the video without suffix; null: the next free number, also where a record is the configuration file."""
    preview_every: int = 0
    """Steps between previews of scenes, which are written beside the finished scenes; 0: none."""

    def __post_init__(self):
        super().__post_init__()
        if self.story is not None:
            for key in ("prompts", "context_videos", "scene_mask", "scene_seeds"):
                if getattr(self, key):
                    raise ValueError(f"story={self.story} and {key} exclude each other: leave one out")
        elif self.seed is None:
            self.seed = DEFAULT_SEED
        for text in self.prompts:
            if not isinstance(text, str):
                raise ValueError(
                    f"prompts has to hold texts, but one is {text!r}: put quotes around a text with a comma or colon"
                )
        if self.story is None and (not self.prompts or not all(text.strip() for text in self.prompts)):
            raise ValueError(
                "prompts has to hold one text for every scene, but is empty or has an empty one; or set story=FILE"
            )
        check_choice("context_start", self.context_start, CONTEXT_STARTS)
        if self.negative_prompt is None:  # negative_prompt= on the command line
            self.negative_prompt = ""
        if self.record is not None:
            self._extend_lists()
        texts = [self.negative_prompt] if isinstance(self.negative_prompt, str) else self.negative_prompt
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"negative_prompt has to be a text or a list of texts, but is {self.negative_prompt!r}")
        if texts is self.negative_prompt and self.prompts and len(texts) != len(self.prompts):
            raise ValueError(f"negative_prompt has {len(texts)} entries for {len(self.prompts)} prompts")
        counts = self.num_frames if isinstance(self.num_frames, list) else [self.num_frames]
        if self.num_frames is not None and not all(type(count) is int for count in counts):
            raise ValueError(f"num_frames has to be a number or a list of numbers, but is {self.num_frames!r}")
        self._check_scenes("scene_mask", (bool,), "true or false")
        self._check_scenes("scene_seeds", (int, NoneType), "a whole number or null")
        seeds = [self.seed, *(self.scene_seeds or [])]
        if not all(seed is None or -(2**63) <= seed < 2**64 for seed in seeds):
            raise ValueError(
                f"seed={self.seed} and scene_seeds have to fit into 64 bits, as torch's generators need it"
            )
        check_at_least("preview_every", self.preview_every, 0)
        check_at_least("count", self.count, 1)
        if self.count > 1 and self.name is not None:
            raise ValueError(f"count={self.count} videos cannot all be named {self.name!r}: leave name out")
        if self.count > 1 and self.context_videos and self.context_start == "random" and self.record is None:
            raise ValueError(
                f"count={self.count} videos share given scenes, but context_start=random draws their frames by the seed of a "
                "video: use context_start=center, or one run per seed"
            )
        if wrong := [number for number in self.redo if number < 1]:
            raise ValueError(f"redo counts scenes from 1, but names {wrong[0]}")
        if (self.redo or self.following) and self.record is None:
            raise ValueError("redo needs an earlier run: pass its record (.json) as the configuration file")
        if self.name is not None:
            check_file_name("name", self.name, ".json")

    def _extend_lists(self) -> None:
        """Extends a record's lists with one entry per scene to the scenes that were added at its end."""
        of_new = {"scene_seeds": None, "scene_mask": True}
        for key in ("scene_seeds", "scene_mask", "num_frames", "negative_prompt"):
            entries = getattr(self, key)
            if isinstance(entries, list) and entries:
                missing = len(self.prompts) - len(entries)
                setattr(self, key, entries + [of_new.get(key, entries[-1])] * missing)

    def _check_scenes(self, key: str, kinds: tuple[type, ...], meaning: str) -> None:
        """Checks a list with one entry per scene."""
        values = getattr(self, key)
        if values is None:
            return
        if not isinstance(values, list) or not all(type(value) in kinds for value in values):
            raise ValueError(f"{key} has to be a list with {meaning} per scene, but is {values!r}")
        if len(values) != len(self.prompts):
            raise ValueError(f"{key} has {len(values)} entries for {len(self.prompts)} prompts")


@dataclass(kw_only=True)
class CheckStoryConfig:
    """The story file to check, and what it is checked against. No weights are read."""

    story: str = ""
    """Story file, or one of the forms that docs/stories.md lists."""
    model: str = "models/Mask2DiT"
    """Model, a folder or a name on the Hugging Face Hub, whose text window and lengths apply. Only its tokenizer and
    configurations are read."""
    revision: str | None = None
    """Branch, tag or commit of a model of the Hugging Face Hub; null: its main branch."""
    variant: str | None = None
    """Variant of the weights, as in generation."""
    fps: int = 8
    """Frames per second, for lengths in seconds."""
    num_frames: int | None = None
    """Frames of the scenes without a length; null: the model's number."""
    window: int | None = None
    """Number of scenes generated together; null: all at once."""

    def __post_init__(self):
        check_at_least("fps", self.fps, 1)
        for name in ("num_frames", "window"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
