"""Step caches: hooks of diffusers that reuse parts of one denoising step in the next ones."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    ModelMixin,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from mask2dit.config import check_cache, check_finite, check_guidance_interval


@dataclass(frozen=True)
class _Preset:
    """A hook with the options that a user may set, and their values if not set."""

    make: Callable[..., Any]
    """Called with the pipeline, the number of steps and the options. Returns the configuration of diffusers."""
    options: Mapping[str, Any]
    is_resettable: bool = True
    """False if the hook loses its place among the steps when its state is reset, as the context cache and an interval of
    guidance require."""


def _pyramid_attention(pipe, num_steps, skip_range, timesteps):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip_range,
        spatial_attention_timestep_skip_range=tuple(timesteps),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _faster(pipe, num_steps, skip_range, timesteps, unconditional_skip_range, unconditional_timesteps, weight):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=skip_range,
        spatial_attention_timestep_skip_range=tuple(timesteps),
        unconditional_batch_skip_range=unconditional_skip_range,
        unconditional_batch_timestep_skip_range=tuple(unconditional_timesteps),
        attention_weight_callback=lambda module: weight,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def _taylorseer(lite: bool):
    def make(pipe, num_steps, interval, warmup, order):
        return TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=warmup,
            max_order=order,
            taylor_factors_dtype=pipe.transformer.dtype,
            use_lite_mode=lite,
            # By default it looks for modules that are named "attn", of which this transformer has none.
            cache_identifiers=None if lite else [r"transformer_blocks\.\d+\.(attn1|ff)"],
        )

    return make


def _magnitude(pipe, num_steps, threshold, max_skip_steps, retention_ratio, ratios):
    if not ratios:
        raise ValueError(
            "cache=mag_cache needs cache_options.ratios, which differ between models: diffusers' MagCacheConfig measures "
            "them with calibrate=True"
        )
    return MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip_steps,
        retention_ratio=retention_ratio,
        num_inference_steps=num_steps,
        mag_ratios=list(ratios),
    )


REPLACED_BRANCH = (
    "cache=faster_cache derives the unguided branch from the guided one, which sees more scenes with context_guidance: use "
    "another cache, or context_guidance=false"
)
TAYLOR = {"interval": 3, "warmup": 3, "order": 1}
PRESETS = {
    "pyramid_attention": _Preset(_pyramid_attention, {"skip_range": 2, "timesteps": (100, 800)}),
    "faster_cache": _Preset(
        _faster,
        {
            "skip_range": 2,
            "timesteps": (-1, 681),
            "unconditional_skip_range": 5,
            "unconditional_timesteps": (-1, 641),
            "weight": 0.5,
        },
    ),
    "first_block": _Preset(
        lambda pipe, num_steps, threshold: FirstBlockCacheConfig(threshold=threshold), {"threshold": 0.1}
    ),
    "taylorseer": _Preset(_taylorseer(lite=False), TAYLOR),
    "taylorseer_lite": _Preset(_taylorseer(lite=True), TAYLOR),
    "mag_cache": _Preset(
        _magnitude,
        {"threshold": 0.06, "max_skip_steps": 3, "retention_ratio": 0.2, "ratios": ()},
        is_resettable=False,
    ),
}


@contextmanager
def step_cache(
    pipe: DiffusionPipeline, name: str | None, options: Mapping[str, Any] | None = None, num_steps: int = 50
) -> Generator[None]:
    """Enables a step cache on the pipeline's transformer, and removes it and what it kept however the block ends.

    Args:
        pipe: the pipeline.
        name: a key of `PRESETS`. None: no cache.
        options: options of the preset in place of its own.
        num_steps: number of denoising steps.

    Raises:
        ValueError: for an unknown cache or option, or if the transformer has a cache already.
    """
    if name is None:
        yield
        return
    options = check_step_cache(name, options)
    pipe.transformer.enable_cache(PRESETS[name].make(pipe, num_steps, **options))
    try:
        yield
    finally:
        pipe.transformer._reset_stateful_cache()
        pipe.transformer.disable_cache()


def restart_step_cache(transformer: ModelMixin) -> None:
    """Removes what a step cache has kept, where the next step computes something else than the last one.

    Raises:
        ValueError: if the cache loses its place among the steps. `check_step_cache` finds this earlier, except for guidance
            that a callback begins or ends.
    """
    if isinstance(transformer._cache_config, MagCacheConfig):
        raise ValueError(
            "cache=mag_cache counts steps, so it cannot start anew where guidance begins or ends, or other scenes are "
            "computed: guide all steps or none, or use another cache"
        )
    transformer._reset_stateful_cache()


def check_branches_are_computed(transformer: ModelMixin, context_guidance: bool) -> None:
    """Raises `ValueError` if the transformer's step cache derives one branch of guidance from the other, which
    `context_guidance` makes differ."""
    if context_guidance and isinstance(transformer._cache_config, FasterCacheConfig):
        raise ValueError(REPLACED_BRANCH)


def check_step_cache(
    name: str | None,
    options: Mapping[str, Any] | None = None,
    context_refresh: int = 1,
    guidance_scale: float = 6.0,
    guidance_interval: tuple[float, float] | None = None,
    context_guidance: bool = False,
) -> dict[str, Any]:
    """Returns all options of a step cache.

    Args:
        name, options: as for `step_cache`.
        context_refresh, guidance_scale, guidance_interval, context_guidance: as for the pipeline.

    Raises:
        ValueError: for an unknown cache or option, guidance that is not finite, a wrong interval, and settings that a cache
            cannot be combined with.
    """
    check_cache(name)
    check_finite("guidance_scale", guidance_scale)
    check_guidance_interval(guidance_interval)
    if name is None:
        if options:
            raise ValueError(f"cache_options={dict(options)} has no effect without cache")
        return {}
    preset = PRESETS[name]
    unknown = set(options or {}) - set(preset.options)
    if unknown:
        raise ValueError(
            f"cache_options names {', '.join(sorted(unknown))}, but cache={name} takes {', '.join(preset.options)}"
        )
    if not preset.is_resettable and (context_refresh > 1 or guidance_interval is not None):
        raise ValueError(
            f"cache={name} counts steps, so it cannot start anew where context_refresh={context_refresh} or "
            f"guidance_interval={guidance_interval} changes what is computed: use context_refresh=1 and no interval, or "
            "another cache"
        )
    if name == "faster_cache" and (guidance_scale <= 1 or guidance_interval is not None):
        raise ValueError(
            "cache=faster_cache replaces the unguided branch, so it needs guidance at every step: set guidance_scale above 1 "
            "and guidance_interval to null"
        )
    if name == "faster_cache" and context_guidance:
        raise ValueError(REPLACED_BRANCH)
    return {**preset.options, **(options or {})}
