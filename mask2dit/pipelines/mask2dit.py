"""Generation of videos of several scenes with one prompt per scene, from noise alone or from given scenes.

Shapes: B stories, S scenes, F latent frames per scene, C latent channels, h x w latent size, L text tokens per scene,
D text width; videos are H x W pixels.
"""

import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import accumulate
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import T5EncoderModel, T5Tokenizer

from mask2dit.config import check_between, check_context_cache, check_finite, check_guidance_interval
from mask2dit.models.context_cache import ContextCache
from mask2dit.models.hub import PARTS, fetch_lora, fetch_model
from mask2dit.models.loading import (
    COMPONENT_NAMES,
    check_dtype,
    check_links,
    check_text_encoder,
    check_weights,
    empty_model,
    folder_variants,
    load_model,
    load_scheduler,
    load_text_encoder,
    load_tokenizer,
    model_folder,
    weight_files,
)
from mask2dit.models.lora import load_lora
from mask2dit.models.parallel import gather_branches
from mask2dit.models.transformer import Mask2DiTTransformer3DModel
from mask2dit.pipelines.memory import check_vae_tiles
from mask2dit.pipelines.prompt_cache import PromptCache
from mask2dit.pipelines.step_cache import check_branches_are_computed, restart_step_cache
from mask2dit.video.reading import read_scene

logger = logging.getLogger(__name__)

Video = str | os.PathLike | np.ndarray  # a file, or (frames, H, W, 3) uint8
COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
OUTPUT_TYPES = ("np", "pt", "pil", "latent")
# These add noise as in training, x_t = alpha_t x_0 + sigma_t e with alpha_t^2 + sigma_t^2 = 1, and do not scale the model's
# input, so that given scenes stay clean.
SCHEDULERS = (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VAE_AXES = "as the VAE's configuration says; with tiling, enable it by mask2dit.pipelines.memory.enable_vae_tiling"
VAE_REMEDY = "the VAE overflows, or its weights are damaged; use dtype bfloat16 or float32"
SAMPLING_REMEDY = (
    "use dtype bfloat16 or float32 and a smaller guidance_scale, and look for NaN in the weights and the LoRA"
)
MODEL_NAMES = tuple(COMPONENT_NAMES)  # components with weights
QUOTED = 300  # maximum number of characters that a warning quotes from a prompt
CUTS_WARNED_OF: set[str] = set()  # per process, since training embeds the same captions repeatedly


class VideoShape(NamedTuple):
    """Frame counts and latent size of a video of several scenes."""

    frames: tuple[int, ...]
    """Frames of each scene."""
    latent_frames: tuple[int, ...]
    """Latent frames of each scene."""
    latent_size: tuple[int, int, int]
    """(C, h, w) of a latent frame."""


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """The checked arguments of a call that describe its stories."""

    batch_size: int
    prompts: list[list[str]] | None
    """B lists of S prompts; None if embeddings are given."""
    negatives: list[list[str]] | None
    prompt_embeds: torch.Tensor | None
    """Embeddings of the prompts, (B, S, L, D); None if texts are given."""
    negative_prompt_embeds: torch.Tensor | None
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    shape: VideoShape
    generated: tuple[bool, ...]
    """True for each scene that is generated, False for each that is given."""
    context_video: list[list[Video]] | None
    """B lists of the given scenes."""
    context_latents: torch.Tensor | None
    """Scaled latents of the given scenes, (B, given*F, C, h, w)."""
    latents: torch.Tensor | None
    """The initial noise, (B, generated*F, C, h, w)."""

    @cached_property
    def is_generated(self) -> torch.Tensor:
        """(S*F,) bools, `generated` for each latent frame."""
        return torch.tensor(self.generated).repeat_interleave(torch.tensor(self.shape.latent_frames))


@dataclass
class DenoisingState:
    """The values that the scheduler or a callback changes at each step."""

    latents: torch.Tensor
    """Latents of all scenes, (B, S*F, C, h, w)."""
    context_latents: torch.Tensor | None
    """Latents of the given scenes, (B, given*F, C, h, w), which do not change."""
    is_generated: torch.Tensor
    """(S*F,) bools, as `CallPlan.is_generated`, on the device."""
    prompt_embeds: torch.Tensor
    """Embeddings of the prompts, (B, S, L, D)."""
    negative_prompt_embeds: torch.Tensor | None
    """Embeddings of the negative prompts, of the same shape."""
    guidance_scale: float
    """Guidance scale before the variation by `use_dynamic_cfg`."""
    guidance_interval: tuple[float, float] | None = None
    """The lowest and the highest timestep that are guided. None: all."""
    context_guidance: bool = False
    """True if the branch of the negative prompts sees each scene alone."""
    denoised: torch.Tensor | None = None
    """Clean latents as the last step predicts them, (B, S*F, C, h, w), from schedulers that return them; otherwise the
    latents. Callbacks may read them."""

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    def is_guided_at(self, timestep: torch.Tensor) -> bool:
        return self.guided and in_interval(timestep.item(), self.guidance_interval)

    def given_parts(self, generated: Sequence[bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the given scenes' latents and embeddings by name."""
        given = ~torch.tensor(generated, device=self.latents.device)  # (S,)
        yield "latents", self.latents[:, ~self.is_generated]
        yield "prompt_embeds", self.prompt_embeds[:, given]
        if self.negative_prompt_embeds is not None:
            yield "negative_prompt_embeds", self.negative_prompt_embeds[:, given]

    def restore_context(self) -> None:
        """Writes the given scenes back into the latents."""
        if self.context_latents is not None:
            self.latents[:, ~self.is_generated] = self.context_latents


def _leaves_hooks_clean(method: Callable) -> Callable:
    """Offloads weights and empties caches of diffusers however the method ends, so that the next call is not affected."""

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        finally:
            self._current_timestep = None
            self.maybe_free_model_hooks()

    return wrapped


class Mask2DiTPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):
    """Generates stories of several scenes with a Mask²DiT transformer.

    Args:
        tokenizer, text_encoder: T5, which embeds the prompts.
        vae: CogVideoX's causal video autoencoder, which encodes and decodes each scene separately.
        transformer: denoises the latents of all scenes together.
        scheduler: CogVideoX's DDIM or DPM scheduler, or another one of `SCHEDULERS` with the model's noise schedule.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    guidance_group = None
    """The processes with one branch of guidance each, from `mask2dit.pipelines.parallel`; None: both are on this one."""
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "denoised"]

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX,
        transformer: Mask2DiTTransformer3DModel,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor_spatial = 2 ** (len(vae.config.block_out_channels) - 1)
        self.vae_scale_factor_temporal = vae.config.temporal_compression_ratio
        self.prompt_cache: PromptCache | None = None
        """Embeddings that are kept; None: every prompt is embedded anew."""
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        mask_variant: str | None = None,
        torch_dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        quantization: Mapping[str, str] | None = None,
        **components,
    ) -> "Mask2DiTPipeline":
        """Reads a folder in diffusers' layout, or a model of the Hugging Face Hub: trained here, released by the authors, or
        plain CogVideoX.

        Its `model_index.json` is not needed, since the classes are known.

        Args:
            pretrained_model_name_or_path: a local folder with `tokenizer/`, `text_encoder/`, `vae/`, `transformer/` and
                `scheduler/`; else a name on the hub, such as "qth/Mask2DiT".
            mask_variant: as for `Mask2DiTTransformer3DModel.from_pretrained`.
            torch_dtype: the dtype of all weights, or of each component, as in `{"transformer": torch.bfloat16, "default":
                torch.float32}`; unnamed components take "default" or, without it, float32.
            variant: the variant to load if a component has several, such as "fp16" for
                `diffusion_pytorch_model.fp16.safetensors`. Components without this variant load their plain weights.
            revision, token, cache_dir, local_files_only: as for `mask2dit.models.hub.fetch_model`; of no effect for a folder.
            quantization: forms of `mask2dit.models.quantization.FORMS` for "transformer" and "text_encoder", as in
                `{"transformer": "int8"}`.
            **components: loaded components by name, instead of those in the folder.

        Raises:
            FileNotFoundError: if the folder or a part of it is missing, or no component has the variant.
            PermissionError, ConnectionError: as `mask2dit.models.hub.fetch_model`.
            ValueError: if a file is corrupt, weights do not fit, or `torch_dtype` does not name dtypes of components.
            TypeError: for a keyword that is not a component.
        """
        dtypes = _component_dtypes(torch_dtype)
        quantization = quantization or {}
        if unknown := quantization.keys() - {"transformer", "text_encoder"}:
            raise ValueError(
                f"quantization can name transformer and text_encoder, but not {', '.join(sorted(unknown))}"
            )
        for name in components:
            if name not in COMPONENTS:
                raise TypeError(
                    f"{name!r} is not a component of {cls.__name__}: its components are {', '.join(COMPONENTS)}"
                )
        folder = fetch_model(
            pretrained_model_name_or_path,
            parts=[part for part in PARTS if part not in components],
            revision=revision,
            variant=variant,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        check_links(folder, set(COMPONENTS) - components.keys())
        variants = folder_variants(folder, variant, [name for name in MODEL_NAMES if name not in components])
        loaders = {
            "tokenizer": lambda: load_tokenizer(folder / "tokenizer"),
            "scheduler": lambda: load_scheduler(folder / "scheduler"),
            "transformer": lambda: Mask2DiTTransformer3DModel.from_pretrained(
                folder,
                subfolder="transformer",
                mask_variant=mask_variant,
                torch_dtype=dtypes["transformer"],
                variant=variants["transformer"],
                quantization=quantization.get("transformer"),
            ),
            "vae": lambda: load_model(
                AutoencoderKLCogVideoX,
                AutoencoderKLCogVideoX.from_pretrained,
                model_folder(folder, "vae"),
                variant=variants["vae"],
                torch_dtype=dtypes["vae"],
            ),
            "text_encoder": lambda: load_text_encoder(
                folder / "text_encoder",
                dtypes["text_encoder"],
                variants["text_encoder"],
                quantization.get("text_encoder"),
            ),
        }
        pipeline = cls(**{name: components[name] if name in components else load() for name, load in loaders.items()})
        pipeline.register_to_config(_name_or_path=str(folder))
        return pipeline

    @classmethod
    def skeleton(
        cls, folder: str | os.PathLike, configs_only: bool = False, variant: str | None = None
    ) -> "Mask2DiTPipeline":
        """Builds a pipeline without weights or text encoder, which is fast, suffices for `video_shape` and checks the folder.

        Args:
            folder: a local folder, as for `from_pretrained`.
            variant: as for `from_pretrained`.
            configs_only: True reads only configurations: weights are not checked, and there is no tokenizer.

        Raises:
            FileNotFoundError: if a part of the folder is missing, weights included.
            ValueError: if a file is corrupt or weights do not fit.
        """
        folder = Path(folder)
        check_links(folder, COMPONENTS)
        variants = {} if configs_only else folder_variants(folder, variant)
        empty = {}
        for name, model_class in (("transformer", Mask2DiTTransformer3DModel), ("vae", AutoencoderKLCogVideoX)):
            path = model_folder(folder, name)
            empty[name] = empty_model(model_class, path)
            if not configs_only:
                check_weights(empty[name], path, weight_files(path, variants[name]))
        if not configs_only:
            check_text_encoder(folder / "text_encoder", variants["text_encoder"])
        return cls(
            **empty,
            tokenizer=None if configs_only else load_tokenizer(folder / "tokenizer"),
            text_encoder=None,
            scheduler=load_scheduler(folder / "scheduler"),
        )

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        """Loads a LoRA of CogVideoX as in diffusers, in the form of diffusers, PEFT, ComfyUI, kohya or VideoX-Fun.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a name on the Hugging Face Hub, or the weights by key.
            adapter_name, hotswap, low_cpu_mem_usage: as in diffusers.
            **kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir` and `local_files_only` as for
                `mask2dit.models.hub.fetch_lora`; others as for `lora_state_dict` of diffusers.

        Raises:
            FileNotFoundError: if there is none.
            PermissionError, ConnectionError: as `mask2dit.models.hub.fetch_lora`.
            ValueError: if the LoRA was made for another transformer, or a key cannot be converted; nothing is loaded.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            of_hub = ("weight_name", "subfolder", "revision", "token", "cache_dir", "local_files_only")
            source = fetch_lora(source, **{name: kwargs.pop(name) for name in of_hub if name in kwargs})
        state_dict, metadata = load_lora(source, self.transformer, **kwargs)
        self.load_lora_into_transformer(
            state_dict,
            transformer=self.transformer,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    @torch.no_grad()
    @_leaves_hooks_clean
    def __call__(
        self,
        prompt: list[str] | list[list[str]] | None = None,
        negative_prompt: str | list[str] | list[list[str]] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | Sequence[int] | None = None,
        context_video: Sequence[Video] | Sequence[Sequence[Video]] | None = None,
        context_latents: torch.Tensor | None = None,
        scene_mask: Sequence[bool] | torch.Tensor | None = None,
        noise_context: bool = False,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: dict | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        context_refresh: int = 1,
        context_cache_device: str = "model",
        context_cache_dtype: str = "auto",
        guidance_interval: tuple[float, float] | None = None,
        context_guidance: bool = False,
    ) -> CogVideoXPipelineOutput | tuple:
        """Generates all scenes at once, or the missing scenes from given ones.

        The published model was trained to generate all scenes, or the last one from all before it. Other patterns that
        `context_video`, `context_latents` and `scene_mask` allow (several scenes from one, a scene in the middle) are
        outside that training; a model trained with random given scenes supports them.

        Args:
            prompt: one prompt per scene, given or generated; or a list of such lists, B stories with the same number of
                scenes.
            negative_prompt: one negative prompt for all scenes, or one per scene (of each story). None: the empty text.
            height, width: size of the video in pixels. None: the model's training size, 480x720 for CogVideoX-5B.
            num_frames: frames per scene: one number for all scenes, or one per scene. None: the model's training length,
                49 for CogVideoX-5B.
            context_video: the given scenes in order, each a file or a (frames, H, W, 3) uint8 array; a list of such lists
                if B > 1. Frames are taken from the centre at the largest stride of 3 … 1 that fits.
            context_latents: the given scenes as scaled latents (B, given*F, C, h, w), instead of `context_video`.
            scene_mask: (S,) bools, True for generated scenes, False for given ones. None: the given scenes come first.
            noise_context: True adds noise to the given scenes at timestep 0, as the published pipeline does; in training,
                they are clean.
            num_inference_steps: number of denoising steps.
            guidance_scale: scale of classifier-free guidance; 1 or less disables it and halves the computation.
            use_dynamic_cfg: True varies the guidance over the steps by the formula of diffusers' CogVideoX pipeline.
            eta: passed on to the scheduler, from 0 to 1; diffusers' CogVideoX schedulers ignore it.
            generator: makes the noise reproducible; one generator, or a list with one per story.
            latents: the initial noise of the generated scenes, (B, generated*F, C, h, w).
            prompt_embeds, negative_prompt_embeds: (B, S, L, D), instead of texts.
            output_type: "np", "pt", "pil" or "latent".
            return_dict: False returns a tuple.
            attention_kwargs: passed on to the transformer; "scale" scales LoRA layers.
            callback_on_step_end: as in diffusers. Its "latents" are those of all scenes; given scenes are restored after it.
                Embeddings are (B, S, L, D), with negative ones separate. It may change `_guidance_scale`, as
                `SDCFGCutoffCallback` does; the change takes effect at the next step.
            callback_on_step_end_tensor_inputs: a selection of "latents", "prompt_embeds", "negative_prompt_embeds" and
                "denoised", the clean latents that the step predicts, which a callback cannot change.
            context_refresh: compute the given scenes at the first and every k-th step alone. At the steps between them,
                generated scenes attend to the given scenes' kept keys and values. 1: at every step, which is exact.
            context_cache_device: where keys and values are kept: "model" (the transformer's device) or "cpu".
            context_cache_dtype: how keys and values are kept: "auto" (in the dtype that they are computed in) or "fp8".
            guidance_interval: the lowest and the highest timestep that are guided (Kynkäänniemi et al. 2024, arXiv
                2404.07724). Other steps cost half, since they compute the prompts' branch alone. None: all.
            context_guidance: True if, where scenes are given, the branch of the negative prompts sees each scene alone (mask
                v1), so that guidance strengthens what the given scenes tell beside what the prompts say (history guidance,
                arXiv 2502.06764). Without given scenes it has no effect.

        Returns:
            `CogVideoXPipelineOutput` whose `frames` hold all S scenes, given ones included: "np" (B, S*frames, H, W, 3) in
            [0, 1]; "pt" (B, S*frames, 3, H, W); "pil" a list of images per story; "latent" (B, S*F, C, h, w) scaled.

        Raises:
            ValueError, FileNotFoundError: for invalid arguments, before any expensive work. Also, with `context_refresh`
                above 1, if a callback changes latents or embeddings of a given scene.
            FloatingPointError: if a scene is not finite.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_options(num_inference_steps, output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_finite("guidance_scale", guidance_scale)
        check_finite("attention_kwargs['scale']", (attention_kwargs or {}).get("scale", 1.0))
        check_between("eta", eta, 0, 1)
        check_context_cache(context_refresh, context_cache_device, context_cache_dtype)
        check_guidance_interval(guidance_interval)
        check_branches_are_computed(self.transformer, context_guidance)
        guided = guidance_scale > 1.0
        texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        size = (height, width, num_frames)
        plan = self._plan(texts, size, context_video, context_latents, scene_mask, latents, generator, guided)
        cache = None
        if context_refresh > 1:
            cache = ContextCache(plan.generated, context_refresh, context_cache_device, context_cache_dtype)

        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep, self._interrupt = None, False
        # A callback may enable guidance.
        with_negatives = guided or (callback_on_step_end is not None and self.text_encoder is not None)
        state = self._prepare(plan, num_inference_steps, guidance_scale, with_negatives, noise_context, generator)
        state.guidance_interval = guidance_interval
        state.context_guidance = context_guidance and not all(plan.generated)
        latents = self._denoise(
            plan,
            state,
            num_inference_steps,
            use_dynamic_cfg,
            self._extra_step_kwargs(generator, eta),
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            cache,
        )
        video = latents
        if output_type != "latent":
            video = self.decode_latents(latents, plan.shape.latent_frames, output_type)
        return CogVideoXPipelineOutput(frames=video) if return_dict else (video,)

    def _plan(self, texts, size, context_video, context_latents, scene_mask, latents, generator, guided) -> CallPlan:
        """Checks the arguments of `__call__` that describe its stories, without reading files."""
        prompt, negative_prompt, prompt_embeds, negative_prompt_embeds = texts
        prompts = self._stories(prompt, prompt_embeds)
        batch_size, num_scenes = (len(prompts), len(prompts[0])) if prompts else prompt_embeds.shape[:2]
        negatives = self._negatives(negative_prompt, negative_prompt_embeds, batch_size, num_scenes)
        height, width, num_frames = self.fill_size(*size)
        shape = self.video_shape(height, width, num_frames, num_scenes)
        context_video = _videos_of_stories(context_video, batch_size)
        plan = CallPlan(
            batch_size=batch_size,
            prompts=prompts,
            negatives=negatives,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            height=height,
            width=width,
            shape=shape,
            generated=self._generated_scenes(scene_mask, context_video, context_latents, shape.latent_frames),
            context_video=context_video,
            context_latents=context_latents,
            latents=latents,
        )
        config = self.transformer.config
        text_shape = (batch_size, num_scenes, config.max_text_seq_length, config.text_embed_dim)
        check_shape("prompt_embeds", prompt_embeds, text_shape, "stories, scenes, tokens, width")
        check_shape("negative_prompt_embeds", negative_prompt_embeds, text_shape, "stories, scenes, tokens, width")
        num_generated = int(plan.is_generated.sum())
        num_given = len(plan.is_generated) - num_generated
        for name, given, count in (
            ("latents", latents, num_generated),
            ("context_latents", context_latents, num_given),
        ):
            check_shape(name, given, (batch_size, count, *shape.latent_size), "stories, latent frames, channels, h, w")
        shares_passes = self.guidance_group is not None or self.transformer.ulysses_group is not None
        if shares_passes and generator is None:
            raise ValueError(
                "processes that share passes have to draw the same noise: give each a generator of one seed"
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"there are {len(generator)} generators for {batch_size} stories")
        if self.text_encoder is None and self.prompt_cache is None and (prompts or (guided and negatives)):
            raise ValueError(
                "this pipeline has no text encoder: give prompt_embeds and, with guidance, negative_prompt_embeds too"
            )
        return plan

    def _prepare(
        self,
        plan: CallPlan,
        num_inference_steps: int,
        guidance_scale: float,
        with_negatives: bool,
        noise_context: bool,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> DenoisingState:
        """Encodes context and texts, sets the timesteps and draws the noise."""
        device, dtype = self._execution_device, self.transformer.dtype

        # Context first, so that an unreadable file ends the call early
        context_latents = plan.context_latents
        if plan.context_video is not None:
            context_frames = [n for n, new in zip(plan.shape.frames, plan.generated) if not new]
            context_latents = self.encode_context(plan.context_video, context_frames, plan.height, plan.width)

        prompt_embeds, negative_prompt_embeds = plan.prompt_embeds, plan.negative_prompt_embeds
        if prompt_embeds is None:
            prompt_embeds = self.encode_prompt(plan.prompts)
        if with_negatives and negative_prompt_embeds is None:
            negative_prompt_embeds = self.encode_prompt(plan.negatives)
        prompt_embeds = prompt_embeds.to(device, dtype)
        if negative_prompt_embeds is not None:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)

        is_generated = plan.is_generated.to(device)
        noise = plan.latents
        if noise is None:
            shape = (plan.batch_size, int(plan.is_generated.sum()), *plan.shape.latent_size)
            noise = randn_tensor(shape, generator, device, dtype)
        noise = noise.to(device, dtype)
        latents = noise.new_empty((plan.batch_size, len(is_generated), *plan.shape.latent_size))
        latents[:, is_generated] = noise
        if context_latents is not None:
            context_latents = context_latents.to(device, dtype)
            if noise_context:
                noise = randn_tensor(context_latents.shape, generator, device, dtype)
                alpha = float(self.scheduler.alphas_cumprod[0])  # which bfloat16 would round to 1
                noised = alpha**0.5 * context_latents.float() + (1 - alpha) ** 0.5 * noise.float()
                context_latents = noised.to(dtype)
        state = DenoisingState(
            latents, context_latents, is_generated, prompt_embeds, negative_prompt_embeds, guidance_scale
        )
        state.restore_context()
        return state

    def _denoise(
        self,
        plan: CallPlan,
        state: DenoisingState,
        num_inference_steps: int,
        use_dynamic_cfg: bool,
        extra_step_kwargs: dict,
        attention_kwargs: dict | None,
        callback: Callable | None,
        callback_tensors: Sequence[str],
        cache: ContextCache | None,
    ) -> torch.Tensor:
        """Runs all steps of the scheduler. Returns the latents of all scenes, (B, S*F, C, h, w)."""
        device = state.latents.device
        timesteps = self.scheduler.timesteps
        step_kwargs = {**extra_step_kwargs, "return_dict": False}
        image_rotary_emb = self.transformer.rotary_embeddings(
            *plan.shape.latent_size[1:], len(state.is_generated), device
        )
        old_pred_original_sample, guided = None, False  # the first is for DPM
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                was_guided, guided = guided, state.is_guided_at(t)
                if i and guided != was_guided and self.transformer.is_cache_enabled:
                    restart_step_cache(self.transformer)  # its tensors have another batch size
                noise_pred = self._predict(plan, state, i, t, guided, image_rotary_emb, attention_kwargs, cache)
                if use_dynamic_cfg:
                    progress = (num_inference_steps - t.item()) / num_inference_steps
                    self._guidance_scale = 1 + state.guidance_scale * (1 - math.cos(math.pi * progress**5.0)) / 2
                if guided:
                    uncond, cond = noise_pred.chunk(2)
                    noise_pred = uncond + self.guidance_scale * (cond - uncond)

                if isinstance(self.scheduler, CogVideoXDPMScheduler):
                    previous_t = timesteps[i - 1] if i > 0 else None
                    stepped = self.scheduler.step(
                        noise_pred, old_pred_original_sample, t, previous_t, state.latents, **step_kwargs
                    )
                    old_pred_original_sample = stepped[1]
                else:
                    stepped = self.scheduler.step(noise_pred, t, state.latents, **step_kwargs)
                state.latents, state.denoised = stepped[0].to(self.transformer.dtype), stepped[-1]
                state.restore_context()
                if callback is not None:
                    self._call_back(callback, callback_tensors, i, t, state, cache)
                progress_bar.update()
        return state.latents

    def _predict(
        self,
        plan: CallPlan,
        state: DenoisingState,
        step: int,
        t: torch.Tensor,
        guided: bool,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
        attention_kwargs: dict | None,
        cache: ContextCache | None,
    ) -> torch.Tensor:
        """Calls the transformer for a step.

        Returns:
            float32 (B, S*F, C, h, w); with guidance (2*B, S*F, C, h, w), of which the first half is for the negative prompts.
        """
        branches = [state.negative_prompt_embeds, state.prompt_embeds] if guided else [state.prompt_embeds]
        isolates = guided and state.context_guidance
        isolated_parts = (True, False) if isolates else (False,)
        divided = guided and self.guidance_group is not None
        if divided:
            rank = self.guidance_group.rank()
            branches, isolated_parts = [branches[rank]], (isolates and rank == 0,)
        embeds = torch.cat(branches)
        if cache is not None and cache.start_step(step, guided) and self.transformer.is_cache_enabled:
            restart_step_cache(self.transformer)  # its tensors are those of other scenes
        # 1 for scenes at timestep t, 0 for clean ones
        scene_timesteps = torch.tensor(plan.generated, device=embeds.device)[None]
        with self.transformer.cache_context("cond_uncond"):
            prediction = self.transformer(
                hidden_states=torch.cat([state.latents] * len(branches)),
                encoder_hidden_states=embeds.flatten(1, 2),
                timestep=(t * scene_timesteps).expand(len(embeds), -1),
                image_rotary_emb=image_rotary_emb,
                scene_frames=plan.shape.latent_frames,
                attention_kwargs=attention_kwargs,
                return_dict=False,
                context_cache=cache,
                isolated_parts=isolated_parts,
            )[0].float()
        return gather_branches(prediction, self.guidance_group) if divided else prediction

    def _call_back(
        self,
        callback: Callable,
        names: Sequence[str],
        step: int,
        t: torch.Tensor,
        state: DenoisingState,
        cache: ContextCache | None,
    ) -> None:
        """Calls the callback at the end of a step, and applies its changes to tensors and guidance."""
        given = {} if cache is None else {name: part.clone() for name, part in state.given_parts(cache.generated)}
        tensors = {name: getattr(state, name) for name in self._callback_tensor_inputs}
        text_shape = state.prompt_embeds.shape
        shapes = {"latents": state.latents.shape, "prompt_embeds": text_shape, "negative_prompt_embeds": text_shape}
        shapes["denoised"] = state.latents.shape
        guidance_before, was_guided = self._guidance_scale, state.guided
        changed = callback(self, step, t, {name: tensors[name] for name in names})
        if self._guidance_scale != guidance_before:
            check_finite("guidance_scale", self._guidance_scale)
            state.guidance_scale = self._guidance_scale
        is_cut = len(changed.get("prompt_embeds", state.prompt_embeds)) < len(state.prompt_embeds)
        if was_guided and not state.guided and is_cut:
            # diffusers' callbacks cut the prompt out of [negative, positive]. Here they are already separate.
            changed = {name: value for name, value in changed.items() if name != "prompt_embeds"}
        for name in changed.keys() & tensors.keys():
            check_shape(f"the callback's {name}", changed[name], tuple(shapes[name]), "as it was given")
            setattr(state, name, changed[name])
        if state.guided and state.negative_prompt_embeds is None:
            raise ValueError(
                f"the callback switched guidance on (guidance_scale={state.guidance_scale}), which needs "
                "negative_prompt_embeds where there is no text encoder: pass them"
            )
        if cache is not None:
            for name, part in state.given_parts(cache.generated):
                if name in given and not torch.equal(part.to(given[name].dtype), given[name]):
                    raise ValueError(
                        f"the callback changed {name} of a given scene, whose keys and values are kept between steps: with "
                        f"context_refresh={cache.refresh} change generated scenes alone, or use context_refresh=1"
                    )
        state.restore_context()

    @torch.no_grad()
    def encode_prompt(self, prompts: list[list[str]]) -> torch.Tensor:
        """Embeds the prompt of each scene separately.

        A prompt longer than the text window is truncated, with a warning that quotes the lost part, once per process.

        Args:
            prompts: B lists of S texts.

        Returns:
            (B, S, L, D) in the text encoder's dtype.
        """
        texts = list(dict.fromkeys(text for story in prompts for text in story))  # embed repeated texts once
        for text in texts:
            cut = self.describe_cut(text)
            if cut is not None and cut not in CUTS_WARNED_OF:
                CUTS_WARNED_OF.add(cut)
                logger.warning("%s", cut)
        if self.prompt_cache is None:
            by_text = dict(zip(texts, self._embed(texts)))
        else:
            by_text = {text: self._cached_embedding(text) for text in texts}
        return torch.stack([torch.stack([by_text[text] for text in story]) for story in prompts])

    def _embed(self, texts: list[str]) -> torch.Tensor:
        """Embeds texts, (texts, L, D)."""
        window = self.transformer.config.max_text_seq_length
        tokens = self.tokenizer(texts, padding="max_length", max_length=window, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0]

    def _cached_embedding(self, text: str) -> torch.Tensor:
        """Takes the embedding of a text from the cache, (L, D), or computes and keeps it. Texts are embedded one by one, as
        the last bits of a result may depend on the rest of a batch."""
        embedding = self.prompt_cache.load(text)
        if embedding is None:
            if self.text_encoder is None:
                raise ValueError(
                    f"the prompt {text[:QUOTED]!r} is not in {str(self.prompt_cache.folder)!r}, and the text encoder is not "
                    "loaded: load the model with it"
                )
            embedding = self._embed([text])[0]
            self.prompt_cache.save(text, embedding)
        return embedding.to(self._execution_device)

    def describe_cut(self, prompt: str) -> str | None:
        """Describes the part of a prompt that the text window cuts off; None if the prompt fits. Needs no weights."""
        window = self.transformer.config.max_text_seq_length
        token_ids = self.tokenizer(prompt).input_ids
        if len(token_ids) <= window:
            return None
        lost = self.tokenizer.decode(token_ids[window - 1 : -1])
        quoted = lost if len(lost) <= QUOTED else f"{lost[: QUOTED // 2]} … {lost[-QUOTED // 2 :]}"
        return (
            f"a prompt of {len(token_ids)} tokens is longer than the text window of {window}; this part is cut off: "
            f"{quoted!r}"
        )

    @torch.no_grad()
    @_leaves_hooks_clean  # with model offload, the VAE would stay on the device until decoding
    def encode_context(
        self,
        videos: Sequence[Sequence[Video]],
        num_frames: Sequence[int],
        height: int,
        width: int,
        start: str = "center",
        sample_posterior: bool = False,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Encodes each given scene separately.

        Args:
            videos: B lists of given scenes in order.
            num_frames: frames of each given scene.
            height, width: size in pixels to which frames are resized and centre-cropped.
            start: "center" takes the middle of a clip, "random" a random frame range, as published.
            sample_posterior: True samples the latent distribution, as published; False takes its mode.
            generator: generator for a random start and for sampling.

        Returns:
            (B, given*F, C, h, w) scaled latents, for `context_latents`.

        Raises:
            FileNotFoundError, ValueError: if a video is missing, unreadable or too short.
            FloatingPointError: if latents are not finite.
        """
        check_vae_tiles(self.vae)
        num_frames = self._frames_of_scenes(num_frames, len(videos[0]))
        scenes = [  # read everything before encoding anything
            torch.stack(
                [read_scene(story[scene], n, height, width, start=start, generator=generator) for story in videos]
            )
            for scene, n in enumerate(num_frames)
        ]
        latents = []
        for scene in scenes:
            pixels = scene.transpose(1, 2).to(self._execution_device, self.vae.dtype)  # (B, 3, frames, H, W)
            posterior = self.vae.encode(pixels).latent_dist
            latent = posterior.sample(generator) if sample_posterior else posterior.mode()
            latent = latent.transpose(1, 2) * self.vae.config.scaling_factor
            size = (height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial)
            latent_frames = (pixels.shape[2] - 1) // self.vae_scale_factor_temporal + 1
            check_shape("an encoded scene", latent, (len(latent), latent_frames, latent.shape[2], *size), VAE_AXES)
            require_finite(f"the latents of given scene {len(latents) + 1}", latent, VAE_REMEDY)
            latents.append(latent)
        return torch.cat(latents, dim=1)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, scene_frames: Sequence[int], output_type: str = "np"):
        """Decodes scenes one by one.

        Args:
            latents: (B, S*F, C, h, w), scaled.
            scene_frames: latent frames of each scene.
            output_type: "np", "pt" or "pil".

        Returns:
            The videos in the form that `__call__` returns.

        Raises:
            FloatingPointError: if the latents or pixels of a scene are not finite.
        """
        check_vae_tiles(self.vae)
        scenes = []
        for number, scene in enumerate(latents.split(list(scene_frames), dim=1), start=1):
            require_finite(f"the latents of scene {number}", scene, SAMPLING_REMEDY)
            num_frames = (scene.shape[1] - 1) * self.vae_scale_factor_temporal + 1
            unscaled = 1 / self.vae.config.scaling_factor * scene.transpose(1, 2).to(self.vae.dtype)
            pixels = self.vae.decode(unscaled).sample  # (B, 3, frames, H, W)
            # From an even number of latent frames (CogVideoX 1.5), the VAE makes a few extra frames at the start.
            pixels = pixels[:, :, -num_frames:]
            size = tuple(n * self.vae_scale_factor_spatial for n in scene.shape[-2:])
            check_shape("a decoded scene", pixels, (len(scene), pixels.shape[1], num_frames, *size), VAE_AXES)
            require_finite(f"the pixels of scene {number}", pixels, VAE_REMEDY)
            scenes.append(self.video_processor.postprocess_video(pixels, output_type))
        if output_type == "np":
            return np.concatenate(scenes, axis=1)
        if output_type == "pt":
            return torch.cat(scenes, dim=1)
        return [[image for scene in story for image in scene] for story in zip(*scenes)]

    def fill_size(
        self, height: int | None, width: int | None, num_frames: int | Sequence[int] | None
    ) -> tuple[int, int, int | Sequence[int]]:
        """Returns height, width and frames per scene, with the model's training values for None. Needs no weights."""
        config = self.transformer.config
        if num_frames is None:
            # The config of CogVideoX 1.5 names 81 frames, but the temporal patch does not divide their 21 latent frames. As
            # in diffusers, take the next number that it divides.
            ratio, patch_t = self.vae_scale_factor_temporal, config.patch_size_t or 1
            latent_frames = (config.sample_frames - 1) // ratio + 1
            num_frames = (-(-latent_frames // patch_t) * patch_t - 1) * ratio + 1
        return (
            config.sample_height * self.vae_scale_factor_spatial if height is None else height,
            config.sample_width * self.vae_scale_factor_spatial if width is None else width,
            num_frames,
        )

    def video_shape(self, height: int, width: int, num_frames: int | Sequence[int], num_scenes: int) -> VideoShape:
        """Returns the frames and latent frames of a video of this size. Needs no weights.

        Raises:
            ValueError: for a size that VAE, patch or positions do not support, with the nearest supported sizes.
        """
        step = self.vae_scale_factor_spatial * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % step:
                below = size // step * step
                nearest = f"{below} or {below + step}" if below > 0 else str(step)
                raise ValueError(f"{name}={size} has to be a multiple of {step}; the nearest is {nearest}")
        frames = self._frames_of_scenes(num_frames, num_scenes)
        latent_frames = tuple((n - 1) // self.vae_scale_factor_temporal + 1 for n in frames)
        latent_size = (height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial)
        self.transformer.scene_layout(*latent_size, latent_frames)
        return VideoShape(frames, latent_frames, (self.transformer.config.in_channels, *latent_size))

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def attention_kwargs(self) -> dict | None:
        return self._attention_kwargs

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _check_options(self, num_inference_steps, output_type, callback, callback_tensors) -> None:
        check_scheduler(self.scheduler)
        self.check_steps(num_inference_steps)
        check_vae_tiles(self.vae)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type has to be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}")
        unknown = [name for name in callback_tensors if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs can name {', '.join(self._callback_tensor_inputs)}, but not "
                f"{', '.join(unknown)}"
            )
        for one in callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]:
            if isinstance(one, IPAdapterScaleCutoffCallback):
                raise ValueError(f"{type(one).__name__} cannot be used, since this pipeline has no IP adapter")

    def check_steps(self, num_inference_steps: int) -> None:
        """Raises `ValueError` for a number of steps that the scheduler does not support."""
        most = self.scheduler.config.num_train_timesteps
        if not isinstance(num_inference_steps, Integral) or not 1 <= num_inference_steps <= most:
            raise ValueError(
                f"num_inference_steps={num_inference_steps} has to be between 1 and {most}, without a fraction"
            )

    def _frames_of_scenes(self, num_frames, num_scenes) -> tuple[int, ...]:
        """Returns the frames of each scene, after checking that VAE and temporal patch support them."""
        frames = (num_frames,) * num_scenes if isinstance(num_frames, Integral) else tuple(num_frames)
        if len(frames) != num_scenes:
            raise ValueError(f"num_frames has {len(frames)} entries for {num_scenes} scenes")
        ratio, patch_t = self.vae_scale_factor_temporal, self.transformer.config.patch_size_t or 1
        for n in frames:  # n = 1 + ratio * (latent frames - 1), with latent frames a multiple of patch_t
            patches = max(0, (n - 1 + ratio) // (ratio * patch_t))
            if n != ratio * (patches * patch_t - 1) + 1 or patches < 1:
                below, above = (ratio * (k * patch_t - 1) + 1 for k in (patches, patches + 1))
                nearest = f"{below} or {above}" if patches > 0 else str(above)
                rule = f"1 + {ratio}m" + (f", with m + 1 a multiple of {patch_t}" if patch_t > 1 else "")
                raise ValueError(f"num_frames={n} has to be {rule} for this model; the nearest is {nearest}")
        return frames

    @staticmethod
    def _stories(prompt, prompt_embeds) -> list[list[str]] | None:
        """Returns the prompts as B lists of S texts; None if embeddings are given."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give the scenes either as prompt or as prompt_embeds: one text or embedding per scene")
        if prompt is None:
            if prompt_embeds.ndim != 4:
                raise ValueError(
                    "prompt_embeds has to be (stories, scenes, text tokens, text width), but has the shape "
                    f"{tuple(prompt_embeds.shape)}"
                )
            return None
        if isinstance(prompt, str):
            raise ValueError(f"prompt has to be a list with one text for every scene, but is the text {prompt!r}")
        nested = len(prompt) > 0 and all(isinstance(story, (list, tuple)) for story in prompt)
        stories = [list(story) for story in prompt] if nested else [list(prompt)]
        for story in stories:
            if not story or not all(isinstance(text, str) for text in story):
                raise ValueError(
                    f"prompt has to hold one text for every scene of at least one scene, but is {prompt!r}"
                )
            if len(story) != len(stories[0]):
                counts = ", ".join(str(len(story)) for story in stories)
                raise ValueError(f"all stories of a batch need equally many scenes, but these have {counts}")
        return stories

    @staticmethod
    def _negatives(negative_prompt, negative_prompt_embeds, batch_size, num_scenes) -> list[list[str]] | None:
        """Returns the negative prompts as B lists of S texts; None if embeddings are given."""
        if negative_prompt_embeds is not None:
            if negative_prompt is not None:
                raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
            return None
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [[negative_prompt or ""] * num_scenes] * batch_size
        nested = len(negative_prompt) > 0 and isinstance(negative_prompt[0], (list, tuple))
        stories = [list(story) for story in negative_prompt] if nested else [list(negative_prompt)] * batch_size
        if not all(isinstance(text, str) for story in stories for text in story):
            raise ValueError(f"negative_prompt has to hold texts, but is {negative_prompt!r}")
        if len(stories) != batch_size or any(len(story) != num_scenes for story in stories):
            counts = ", ".join(str(len(story)) for story in stories)
            raise ValueError(
                f"negative_prompt has to be one text, or one for each of {num_scenes} scenes (of {batch_size} stories), "
                f"but has {counts}"
            )
        return stories

    @staticmethod
    def _generated_scenes(scene_mask, context_video, context_latents, latent_frames) -> tuple[bool, ...]:
        """Returns True for each generated scene and False for each given one."""
        num_scenes = len(latent_frames)
        if context_video is not None and context_latents is not None:
            raise ValueError("give the context either as context_video or as context_latents, not both")
        if scene_mask is not None:
            generated = tuple(bool(new) for new in scene_mask)
            if len(generated) != num_scenes:
                raise ValueError(f"scene_mask has {len(generated)} entries for {num_scenes} scenes")
            num_given = generated.count(False)
            if context_video is not None and len(context_video[0]) != num_given:
                raise ValueError(
                    f"scene_mask marks {num_given} scenes as given, but there are {len(context_video[0])} context videos"
                )
            if context_video is None and context_latents is None and num_given:
                raise ValueError(
                    f"scene_mask marks {num_given} scenes as given, but there is neither context_video nor context_latents"
                )
        elif context_video is not None:
            num_given = len(context_video[0])
        elif context_latents is not None:
            num_given = count_given_scenes(context_latents, latent_frames)
        else:
            num_given = 0
        if num_given >= num_scenes:
            raise ValueError(
                f"{num_given} context scenes leave nothing to generate with {num_scenes} prompts: every scene needs a "
                "prompt, given or generated"
            )
        if scene_mask is not None:
            return generated
        return (False,) * num_given + (True,) * (num_scenes - num_given)

    def _extra_step_kwargs(self, generator, eta) -> dict:
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("generator", generator), ("eta", eta)) if name in accepted}


def check_scheduler(scheduler) -> None:
    """Raises `ValueError` for a scheduler that adds noise or scales latents differently from the model's training."""
    known = ", ".join(cls.__name__ for cls in SCHEDULERS)
    name = type(scheduler).__name__
    if not isinstance(scheduler, SCHEDULERS):
        raise ValueError(f"{name} scales its input or adds noise otherwise than the model was trained: use {known}")
    config = scheduler.config
    if config.prediction_type not in PREDICTION_TYPES or config.get("use_flow_sigmas"):
        raise ValueError(
            f"{name} with prediction_type={config.prediction_type!r} and use_flow_sigmas="
            f"{config.get('use_flow_sigmas', False)} samples flow models: set {' or '.join(PREDICTION_TYPES)}, and false"
        )
    # `from_config` keeps but ignores settings that are unknown to a class.
    shift = config.get("snr_shift_scale", 1.0)
    if shift != 1 and "snr_shift_scale" not in inspect.signature(type(scheduler).__init__).parameters:
        raise ValueError(
            f"{name} does not know snr_shift_scale={shift} of the noise schedule that the model was trained with: use "
            f"{', '.join(cls.__name__ for cls in SCHEDULERS[:2])}"
        )


def in_interval(timestep: float, interval: Sequence[float] | None) -> bool:
    """Returns True for a timestep from the lowest to the highest of an interval; for every timestep without an interval."""
    return interval is None or interval[0] <= timestep <= interval[1]


def require_finite(what: str, values: torch.Tensor, remedy: str) -> None:
    """Raises `FloatingPointError` for an infinity or NaN."""
    if not values.isfinite().all():
        raise FloatingPointError(f"{what} are not finite numbers: {remedy}")


def _component_dtypes(torch_dtype: torch.dtype | dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Returns the dtype of each component with weights. Raises `ValueError` for invalid names and values."""
    if not isinstance(torch_dtype, dict):
        torch_dtype = {"default": torch_dtype}
    names = (*MODEL_NAMES, "default")
    for name, dtype in torch_dtype.items():
        if name not in names:
            raise ValueError(f"torch_dtype names {name!r}, which is not one of {', '.join(names)}")
        check_dtype(dtype)
    default = torch_dtype.get("default") or torch.float32
    return {name: torch_dtype.get(name) or default for name in MODEL_NAMES}


def count_given_scenes(context_latents: torch.Tensor, latent_frames: Sequence[int]) -> int:
    """Counts the first scenes that context latents (B, given*F, C, h, w) hold. Raises `ValueError` unless a count fits."""
    for count, frames in enumerate(accumulate(latent_frames), start=1):
        if frames == context_latents.shape[1]:
            return count
    raise ValueError(
        f"context_latents has {context_latents.shape[1]} latent frames, not a whole number of scenes of "
        f"{', '.join(str(n) for n in latent_frames)} latent frames"
    )


def _videos_of_stories(videos, batch_size) -> list[list[Video]] | None:
    """Returns the given scenes as B lists."""
    if videos is None:
        return None
    if isinstance(videos, (str, os.PathLike)) or getattr(videos, "ndim", 0) == 4:
        what = f"an array of the shape {tuple(videos.shape)}" if hasattr(videos, "shape") else repr(str(videos))
        raise ValueError(f"context_video has to be a list with one video for every given scene, but is {what}")
    nested = len(videos) > 0 and isinstance(videos[0], (list, tuple))
    stories = [list(story) for story in videos] if nested else [list(videos)]
    if len(stories) != batch_size or any(len(story) != len(stories[0]) for story in stories):
        counts = ", ".join(str(len(story)) for story in stories)
        raise ValueError(
            f"context_video needs equally many scenes for each of {batch_size} stories, but there are {counts}"
        )
    if not stories[0]:
        raise ValueError("context_video is empty: leave it out, or name one video for every given scene")
    return stories


def check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """Raises `ValueError`, naming both shapes, if a tensor has another shape. None is accepted."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has to have the shape {shape} ({meaning}), but has {tuple(tensor.shape)}")
