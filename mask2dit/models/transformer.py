"""The CogVideoX transformer over several scenes at once.

Shapes: B stories, S scenes, F latent frames per scene, C latent channels, h x w latent size, L text tokens per scene,
D token width, N tokens of the whole sequence `[T_1 … T_S | V_1 … V_S]`.
"""

import inspect
import os
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.embeddings import get_3d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.utils import apply_lora_scale
from einops import rearrange
from torch import nn

from mask2dit.models.attention import GivenTokens, Mask2DiTAttnProcessor, keep_active_backend
from mask2dit.models.context_cache import ContextCache
from mask2dit.models.parallel import ShardedLayout, check_step_cache, shard_layout
from mask2dit.models.positions import grid_positions, rotary_table, sincos_table
from mask2dit.scenes import SceneLayout


class Mask2DiTBlock(CogVideoXBlock):
    """A CogVideoX block with one timestep per scene and attention under the dual mask."""

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, video tokens, D)
        encoder_hidden_states: torch.Tensor,  # (B, text tokens, D)
        temb: torch.Tensor,  # (B, S, time_embed_dim)
        layout: SceneLayout,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        given: GivenTokens | None = None,  # of the context cache, for the attention processor
        isolated_parts: tuple[bool, ...] = (False,),  # of the batch, for the attention processor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        video, text = hidden_states, encoder_hidden_states

        norm_video, norm_text, video_gate, text_gate = self._modulate(self.norm1, video, text, temb, layout)
        attn_video, attn_text = self.attn1(
            hidden_states=norm_video,
            encoder_hidden_states=norm_text,
            image_rotary_emb=image_rotary_emb,
            layout=layout,
            given=given,
            isolated_parts=isolated_parts,
            **(attention_kwargs or {}),
        )
        video = _add_gated(video, attn_video, video_gate, layout.video_lengths)
        text = _add_gated(text, attn_text, text_gate, layout.text_lengths)

        norm_video, norm_text, video_gate, text_gate = self._modulate(self.norm2, video, text, temb, layout)
        ff_text, ff_video = self.ff(torch.cat([norm_text, norm_video], dim=1)).split(
            [layout.text_length, layout.video_length], dim=1
        )
        video = _add_gated(video, ff_video, video_gate, layout.video_lengths)
        text = _add_gated(text, ff_text, text_gate, layout.text_lengths)
        return video, text

    @staticmethod
    def _modulate(norm, video, text, temb, layout):
        """Applies CogVideoX's adaptive layer norm with one time embedding per scene; the gates are (B, S, D)."""
        # Each part of the norm is called exactly once, because hooks that move weights act on calls.
        shift, scale, gate, text_shift, text_scale, text_gate = norm.linear(norm.silu(temb)).chunk(6, dim=-1)
        video = _shift_and_scale(norm.norm(video), shift, scale, layout.video_lengths)
        text = _shift_and_scale(norm.norm(text), text_shift, text_scale, layout.text_lengths)
        return video, text, gate, text_gate


# Cache hooks of diffusers (first-block cache and others) look up blocks by their exact class.
TransformerBlockRegistry.register(
    Mask2DiTBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
)


class Mask2DiTTransformer3DModel(CogVideoXTransformer3DModel):
    """CogVideoX's transformer with the symmetric binary attention mask and one timestep per scene.

    A scene with timestep 0 is context: it stays as given, and the others are generated from it (the segment-level
    conditional mask). The weights are those of CogVideoX; with one scene at the base size, the results are too.

    Args:
        mask_variant: the relations between scenes that the mask allows, "v1" … "v5"; see `mask2dit.models.masks`.

    All other arguments are those of `diffusers.CogVideoXTransformer3DModel`. `use_learned_positional_embeddings` belongs
    to CogVideoX's image-to-video model and raises `ValueError`.
    """

    _no_split_modules = ["Mask2DiTBlock", "CogVideoXPatchEmbed"]
    _repeated_blocks = ["Mask2DiTBlock"]
    gradient_checkpointing_interval = 1
    """With gradient checkpointing, every n-th block is recomputed in the backward pass; 1: all blocks."""
    ulysses_group = None
    """The processes that share each forward pass, from `mask2dit.models.parallel.apply_ulysses`; None: only this one."""

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int | None = 16,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embed_dim: int = 512,
        ofs_embed_dim: int | None = None,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        patch_size_t: int | None = None,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        activation_fn: str = "gelu-approximate",
        timestep_activation_fn: str = "silu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
        use_learned_positional_embeddings: bool = False,
        patch_bias: bool = True,
        mask_variant: str = "v2",
    ):
        if use_learned_positional_embeddings:
            raise ValueError(
                "use_learned_positional_embeddings=True is CogVideoX's image-to-video model, whose table fits one "
                "scene only: use a text-to-video model"
            )
        # Build CogVideoX without blocks and position table, which this class replaces.
        shared = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters.keys() & self.config.keys()
        arguments = {name: self.config[name] for name in shared}
        super().__init__(**{**arguments, "num_layers": 0, "use_rotary_positional_embeddings": True})
        self.register_to_config(
            num_layers=num_layers, use_rotary_positional_embeddings=use_rotary_positional_embeddings
        )

        inner_dim = num_attention_heads * attention_head_dim
        self.transformer_blocks = nn.ModuleList(
            Mask2DiTBlock(
                dim=inner_dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                time_embed_dim=time_embed_dim,
                dropout=dropout,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.set_attn_processor(Mask2DiTAttnProcessor(mask_variant))

        if not use_rotary_positional_embeddings:
            rows, columns = sample_height // patch_size, sample_width // patch_size
            frames = (sample_frames - 1) // temporal_compression_ratio + 1
            table = get_3d_sincos_pos_embed(
                inner_dim, (columns, rows), frames, spatial_interpolation_scale, temporal_interpolation_scale
            )
            self.register_buffer("pos_embedding", table.unflatten(1, (rows, columns)).float(), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        subfolder: str | None = None,
        mask_variant: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        quantization: str | None = None,
        **kwargs,
    ) -> "Mask2DiTTransformer3DModel":
        """Reads a trained folder, a released Mask²DiT folder or a plain CogVideoX folder.

        Args:
            pretrained_model_name_or_path: a local folder; else a name on the Hugging Face Hub, such as "qth/Mask2DiT".
            subfolder: the transformer's subfolder. None: the folder itself or, if it has no `config.json`, its
                `transformer/`.
            mask_variant: "v1" … "v5". None: the config's own, else its `attn_msk_version` n as "vn", else "v2".
            variant: the variant of the weights, see `mask2dit.models.loading.weight_files`. A folder with a single variant
                does not need it.
            revision, token, cache_dir, local_files_only: as for `mask2dit.models.hub.fetch_model`; of no effect for a folder.
            quantization: a form of `mask2dit.models.quantization.FORMS`, such as "int8", to convert the weights to.
            **kwargs: as in diffusers (`torch_dtype`, `device_map`, `quantization_config`, …).

        Raises:
            FileNotFoundError: if the folder, its config or its weights are missing.
            PermissionError, ConnectionError: as `mask2dit.models.hub.fetch_model`.
            ValueError: if a file is corrupt, a weight is missing, unknown or of the wrong shape, or the variant unknown.
        """
        from mask2dit.models.hub import fetch_model
        from mask2dit.models.loading import load_model, model_folder
        from mask2dit.models.quantization import check_unquantized, quantization_config

        local = fetch_model(
            pretrained_model_name_or_path,
            parts=[subfolder or ""],
            revision=revision,
            variant=variant,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        folder = model_folder(local, subfolder, default="transformer")
        if mask_variant is None:
            config = cls.load_config(folder)
            version = config.get("attn_msk_version")
            mask_variant = config.get("mask_variant") or ("v2" if version is None else f"v{version}")
        if quantization is not None:
            check_unquantized(cls.load_config(folder), "the transformer")
            dtype = kwargs.get("torch_dtype") or torch.float32
            kwargs["quantization_config"] = quantization_config(quantization, dtype, "diffusers")
        return load_model(cls, super().from_pretrained, folder, variant, mask_variant=mask_variant, **kwargs)

    def set_attention_backend(self, backend: str) -> None:
        """Selects the attention backend, as in diffusers, but of this model alone: others in the process keep theirs."""
        with keep_active_backend():
            super().set_attention_backend(backend)

    def scene_layout(self, latent_height: int, latent_width: int, scene_frames: tuple[int, ...]) -> SceneLayout:
        """Returns the token layout of scenes of this size, after checking that the model supports them.

        Args:
            latent_height, latent_width: h and w.
            scene_frames: latent frames of each scene.

        Raises:
            ValueError: if the size is not divisible by the patch, or exceeds the model's positions.
        """
        patch, patch_t = self.config.patch_size, self.config.patch_size_t or 1
        if latent_height % patch or latent_width % patch:
            raise ValueError(
                f"latents of {latent_height}x{latent_width} do not divide into patches of {patch}x{patch}"
            )
        for frames in scene_frames:
            if frames < 1 or frames % patch_t:
                raise ValueError(
                    f"every scene needs a positive number of latent frames that divides by the temporal patch of "
                    f"{patch_t}, but one has {frames}"
                )
        rows, columns = latent_height // patch, latent_width // patch
        if patch_t > 1:
            max_rows, max_columns = self.config.sample_height // patch, self.config.sample_width // patch
            if rows > max_rows or columns > max_columns:
                raise ValueError(
                    f"{rows}x{columns} tokens per frame are more than the {max_rows}x{max_columns} that this model's "
                    "positions cover: use a smaller height or width"
                )
        if not self.config.use_rotary_positional_embeddings:
            covered = len(self.pos_embedding) * len(scene_frames)
            if sum(scene_frames) > covered:
                raise ValueError(
                    f"{sum(scene_frames)} latent frames are more than the {covered} ({len(scene_frames)} scenes of "
                    f"{len(self.pos_embedding)}) that this model's sin-cos positions cover: use shorter scenes"
                )
        return SceneLayout(
            text_lengths=(self.config.max_text_seq_length,) * len(scene_frames),
            video_lengths=tuple(frames // patch_t * rows * columns for frames in scene_frames),
        )

    def rotary_embeddings(
        self, latent_height: int, latent_width: int, num_latent_frames: int, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Computes rotary positions of all scenes' video tokens, with one time axis through all scenes.

        Args:
            latent_height, latent_width: h and w.
            num_latent_frames: latent frames of all scenes together.

        Returns:
            cos and sin, each (video tokens, head_dim) float32; None for a model with sin-cos positions.
        """
        if not self.config.use_rotary_positional_embeddings:
            return None
        patch, patch_t = self.config.patch_size, self.config.patch_size_t
        grid = (latent_height // patch, latent_width // patch)
        if patch_t is None:
            base_grid = (self.config.sample_height // patch, self.config.sample_width // patch)
            rows, columns = grid_positions(grid, base_grid, device)
        else:  # CogVideoX 1.5 counts in whole positions at every size
            rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
        times = torch.arange(-(-num_latent_frames // (patch_t or 1)), dtype=torch.float32, device=device)
        return rotary_table(self.config.attention_head_dim, times, rows, columns)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        scene_frames: tuple[int, ...] | None = None,
        timestep_cond: torch.Tensor | None = None,
        ofs: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        context_cache: ContextCache | None = None,
        isolated_parts: tuple[bool, ...] = (False,),
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the velocity of every scene.

        Args:
            hidden_states: (B, S*F, C, h, w) latents, scenes one after another in time.
            encoder_hidden_states: (B, S*L, text_embed_dim) prompt embeddings, L = `max_text_seq_length` for each scene.
            timestep: (B,) or (B, S), one per scene; 0 for a context scene.
            image_rotary_emb: cos and sin, each (video tokens, head_dim). None: computed here if the model uses them.
            scene_frames: latent frames of each scene, for instance (13, 13, 7). None: S equal scenes.
            timestep_cond: (B, …), added to the time embedding of every scene of a story.
            ofs: (B,), for models with `ofs_embed_dim`.
            attention_kwargs: passed on to the attention processor; "scale" scales LoRA layers.
            return_dict: False returns a tuple.
            context_cache: an empty one is filled, and all scenes are computed. With a filled one, generated scenes alone
                are computed, and the velocity of given scenes is that of the call that filled it. None: no cache.
            isolated_parts: for each of n equal parts of the batch, one after another, True if its scenes do not see each
                other (mask v1), False for the model's own mask.

        Returns:
            `Transformer2DModelOutput` whose `sample` is (B, S*F, C, h, w).

        Raises:
            ValueError: if shapes do not fit each other or the model; both numbers are named. Also for a context cache
                where gradients are computed, or of another number of scenes.
        """
        _, num_frames, _, height, width = hidden_states.shape
        scene_frames = self._scene_frames(hidden_states, encoder_hidden_states, scene_frames)
        num_scenes = len(scene_frames)
        if len(hidden_states) % len(isolated_parts):
            raise ValueError(
                f"isolated_parts {isolated_parts} do not divide a batch of {len(hidden_states)} into equal parts"
            )
        layout = self.scene_layout(height, width, scene_frames)
        if image_rotary_emb is None:
            image_rotary_emb = self.rotary_embeddings(height, width, num_frames, hidden_states.device)
        elif len(image_rotary_emb[0]) != layout.video_length:
            raise ValueError(
                f"image_rotary_emb has {len(image_rotary_emb[0])} positions for {layout.video_length} video tokens"
            )

        temb = self._time_embeddings(timestep, timestep_cond, ofs, num_scenes, hidden_states)
        text, video = self._embed(hidden_states, encoder_hidden_states, layout)
        whole = layout  # `layout`: the scenes that are computed
        if context_cache is not None:
            layout, text, video, temb, image_rotary_emb = _computed_scenes(
                context_cache, whole, text, video, temb, image_rotary_emb
            )
        if self.ulysses_group is not None:
            layout = shard_layout(layout, self.ulysses_group)
            text, video = layout.share(text, video)

        for i, block in enumerate(self.transformer_blocks):
            if (
                torch.is_grad_enabled()
                and self.gradient_checkpointing
                and i % self.gradient_checkpointing_interval == 0
            ):
                video, text = self._gradient_checkpointing_func(
                    block, video, text, temb, layout, image_rotary_emb, attention_kwargs, None, isolated_parts
                )
            else:
                given = None if context_cache is None else context_cache.layer(i, whole, like=video)
                video, text = block(
                    hidden_states=video,
                    encoder_hidden_states=text,
                    temb=temb,
                    layout=layout,
                    image_rotary_emb=image_rotary_emb,
                    attention_kwargs=attention_kwargs,
                    given=given,
                    isolated_parts=isolated_parts,
                )
                if given is not None and not context_cache.is_filled:
                    context_cache.keep(given)

        output = self._velocity(video, temb, layout, (height, width))
        if context_cache is not None:
            output = context_cache.complete(output, scene_frames)
        if not return_dict:
            return (output,)
        return Transformer2DModelOutput(sample=output)

    def _velocity(self, video, temb, layout: SceneLayout, size: tuple[int, int]) -> torch.Tensor:
        """Computes the velocity of each patch from the last block's output. Returns (B, S*F, C, h, w)."""
        video = self.norm_final(video)
        shift, scale = self.norm_out.linear(self.norm_out.silu(temb)).chunk(2, dim=-1)
        video = _shift_and_scale(self.norm_out.norm(video), shift, scale, layout.video_lengths)
        patches = self.proj_out(video)
        if isinstance(layout, ShardedLayout):
            patches = layout.gather_video(patches)
        return rearrange(
            patches,
            "b (f h w) (c t p q) -> b (f t) c (h p) (w q)",
            h=size[0] // self.config.patch_size,
            w=size[1] // self.config.patch_size,
            t=self.config.patch_size_t or 1,
            p=self.config.patch_size,
            q=self.config.patch_size,
        )

    def _time_embeddings(self, timestep, timestep_cond, ofs, num_scenes: int, latents) -> torch.Tensor:
        """Computes the time embedding of each scene, (B, S, D)."""
        batch_size = len(latents)
        if timestep.shape not in ((batch_size,), (batch_size, num_scenes)):
            raise ValueError(
                f"timestep has to have the shape ({batch_size},) or ({batch_size}, {num_scenes}), one for each story or "
                f"for each of its scenes, but has {tuple(timestep.shape)}"
            )
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, num_scenes)
        if timestep_cond is not None:
            timestep_cond = timestep_cond.repeat_interleave(num_scenes, dim=0)
        temb = self.time_proj(timestep.flatten()).to(latents.dtype)  # (B*S, D)
        temb = self.time_embedding(temb, timestep_cond).unflatten(0, (batch_size, num_scenes))
        if self.ofs_embedding is not None:
            if ofs is None:
                raise ValueError("this model was made with ofs_embed_dim and needs ofs")
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(latents.dtype))[:, None]
        return temb

    def _embed(self, latents, prompt_embeds, layout: SceneLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeds text and video with their positions, (B, n, D) each."""
        tokens = self.patch_embed(prompt_embeds, latents)  # (B, N, D)
        text, video = tokens.split([layout.text_length, layout.video_length], dim=1)
        if not self.config.use_rotary_positional_embeddings:
            _, num_frames, _, height, width = latents.shape
            patch, num_scenes = self.config.patch_size, len(layout.video_lengths)
            table = sincos_table(self.pos_embedding.float(), num_scenes, num_frames, height // patch, width // patch)
            video = video + table.to(video)
        # Contiguous, like the outputs of blocks: with other strides, the first compiled block would need its own graph.
        return self.embedding_dropout(text).contiguous(), self.embedding_dropout(video).contiguous()

    def _scene_frames(self, latents, prompt_embeds, scene_frames) -> tuple[int, ...]:
        """Returns the latent frames of each scene, checked against the shapes of latents and text."""
        batch_size, num_frames, channels = latents.shape[:3]
        text_batch_size, text_length, text_width = prompt_embeds.shape
        expected = (self.config.in_channels, self.config.text_embed_dim)
        if (channels, text_width) != expected:
            raise ValueError(
                f"latents have {channels} channels and text embeddings a width of {text_width}, but the model takes "
                f"{expected[0]} and {expected[1]}"
            )
        if batch_size != text_batch_size:
            raise ValueError(f"{batch_size} stories of latents do not fit {text_batch_size} stories of text")
        window = self.config.max_text_seq_length
        num_scenes = text_length // window  # not divmod, which torch.compile cannot trace with dynamic shapes
        if text_length % window or not num_scenes:
            raise ValueError(f"{text_length} text tokens are not a whole number of scenes of {window} tokens each")
        if scene_frames is None:
            if num_frames % num_scenes:
                raise ValueError(
                    f"{num_frames} latent frames do not divide into {num_scenes} equal scenes: pass scene_frames"
                )
            return (num_frames // num_scenes,) * num_scenes
        if len(scene_frames) != num_scenes:
            raise ValueError(f"scene_frames names {len(scene_frames)} scenes, but there is text for {num_scenes}")
        if sum(scene_frames) != num_frames:
            raise ValueError(
                f"scene_frames {tuple(scene_frames)} add up to {sum(scene_frames)} latent frames, but there are "
                f"{num_frames}"
            )
        return tuple(scene_frames)

    def compile_repeated_blocks(self, *args, dynamic: bool | None = True, **kwargs) -> None:
        """Compiles blocks as in diffusers, but with dynamic shapes from the first call on.

        Blocks are then compiled once per number of scenes, whatever their lengths. With `dynamic=None`, torch compiles for
        fixed lengths first and recompiles for each new one, until its recompile limit ends the run.
        """
        super().compile_repeated_blocks(*args, dynamic=dynamic, **kwargs)

    def set_attn_processor(self, processor) -> None:
        """Sets processors as in diffusers, but refuses those without a `layout` argument, which would drop the mask.

        Raises:
            ValueError: if a processor's `__call__` takes no `layout`.
        """
        for candidate in processor.values() if isinstance(processor, dict) else [processor]:
            if "layout" not in inspect.signature(candidate.__call__).parameters:
                raise ValueError(
                    f"{type(candidate).__name__} takes no `layout` and would silently drop the mask between scenes: "
                    "derive it from Mask2DiTAttnProcessor"
                )
        super().set_attn_processor(processor)

    def enable_cache(self, config) -> None:
        """Enables a step cache as in diffusers.

        Raises:
            ValueError: also for a cache that processes which share a pass cannot use.
        """
        if self.ulysses_group is not None:
            check_step_cache(config)
        super().enable_cache(config)

    def fuse_qkv_projections(self) -> None:
        """Always raises: diffusers' fused processor is unaware of scenes and would silently drop the mask."""
        raise NotImplementedError(
            "fuse_qkv_projections() would replace the attention processor by one without the mask between scenes"
        )


def _computed_scenes(cache: ContextCache, layout: SceneLayout, text, video, temb, image_rotary_emb):
    """Returns the layout, tokens, time embeddings and positions of the scenes that are computed: all of them with an empty
    cache, generated ones with a filled one."""
    if torch.is_grad_enabled():
        raise ValueError("a context cache keeps tensors without their gradients: call the model under torch.no_grad()")
    if len(cache.generated) != layout.num_scenes:
        raise ValueError(f"the context cache is for {len(cache.generated)} scenes, but there are {layout.num_scenes}")
    if not cache.is_filled:
        return layout, text, video, temb, image_rotary_emb
    if image_rotary_emb is not None:
        image_rotary_emb = tuple(cache.select_scenes(table, layout.video_lengths, dim=0) for table in image_rotary_emb)
    return (
        layout.select(cache.generated),
        cache.select_scenes(text, layout.text_lengths),
        cache.select_scenes(video, layout.video_lengths),
        cache.select_scenes(temb, (1,) * layout.num_scenes),
        image_rotary_emb,
    )


def _shift_and_scale(tokens, shift, scale, lengths):
    """Modulates each scene by its own shift and scale. tokens: (B, n, D); shift, scale: (B, S, D)."""
    if _are_equal(lengths):
        scenes = tokens.unflatten(1, (len(lengths), lengths[0]))  # (B, S, n/S, D)
        return (scenes * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)
    scenes = zip(tokens.split(lengths, dim=1), shift.split(1, dim=1), scale.split(1, dim=1))
    return torch.cat([scene * (1 + scene_scale) + scene_shift for scene, scene_shift, scene_scale in scenes], dim=1)


def _add_gated(tokens, update, gate, lengths):
    """Adds each scene's update, scaled by its own gate. tokens, update: (B, n, D); gate: (B, S, D)."""
    if _are_equal(lengths):
        update = update.unflatten(1, (len(lengths), lengths[0]))  # (B, S, n/S, D)
        return tokens + (gate[:, :, None] * update).flatten(1, 2)
    scenes = zip(tokens.split(lengths, dim=1), update.split(lengths, dim=1), gate.split(1, dim=1))
    return torch.cat([scene + scene_gate * scene_update for scene, scene_update, scene_gate in scenes], dim=1)


def _are_equal(lengths) -> bool:
    return all(length == lengths[0] for length in lengths)
