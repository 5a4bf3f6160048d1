"""What caches and guidance on an interval save, and what they cost, on stories of the small world.

The third scene of each story is generated from two real ones, in every row from the same noise. One run makes the table:

- tokens: tokens that pass through the blocks' attention, relative to the first row; likewise FLOPs, of the first story.
- time:   CPU time of denoising, relative to the first row; all rows take turns, story by story.
- scenes right, consistency: as in docs/storyworld.md, with 95% intervals by bootstrap over stories.
- distance: RMS difference of the latents from the first row's.

    python benchmarks/caches.py --stories reporting --num-stories 100
    python benchmarks/caches.py --rows exact k=5 guidance
"""

import argparse
import dataclasses
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mask2dit.files import write_text
from mask2dit.models.loading import select_sampler
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.step_cache import step_cache
from mask2dit.randomness import generator_for
from mask2dit.reporting.bootstrap import mean_interval
from mask2dit.reporting.tables import markdown_table
from mask2dit.storyworld.render import render_scene
from mask2dit.storyworld.report import measure_video
from mask2dit.storyworld.trial import FIRST_STORY, TrialConfig
from mask2dit.storyworld.world import caption, sample_story
from mask2dit.video.frames import to_uint8

GENERATED = (False, False, True)
INTERVAL = [200, 800]  # timesteps
ROWS = {
    "exact": {},
    "k=2": {"context_refresh": 2},
    "k=3": {"context_refresh": 3},
    "k=5": {"context_refresh": 5},
    "k=5, fp8": {"context_refresh": 5, "context_cache_dtype": "fp8"},
    "k=10 (all)": {"context_refresh": 10},
    "guidance": {"guidance_interval": INTERVAL},
    "guidance, k=5": {"guidance_interval": INTERVAL, "context_refresh": 5},
    **{
        f"{name}{suffix}": {"cache": name, **more}
        for name in ("pyramid_attention", "faster_cache", "first_block", "taylorseer", "taylorseer_lite")
        for suffix, more in (("", {}), (", k=5", {"context_refresh": 5}))
    },
}


class Counter:
    """Counts the tokens that pass through the attention of a transformer's blocks."""

    def __init__(self, transformer):
        self.tokens = 0
        for block in transformer.transformer_blocks:
            block.attn1.to_q.register_forward_hook(self._count)

    def _count(self, module, inputs, output):
        self.tokens += inputs[0].shape[0] * inputs[0].shape[1]


def given_scenes(pipe: Mask2DiTPipeline, config: TrialConfig, seed: int) -> dict:
    """Arguments of the pipeline for a story."""
    story = sample_story(seed, 3, config.split)
    rendered = [[render_scene(story, k, config.num_frames, config.height, config.width) for k in range(2)]]
    frames = (config.num_frames,) * 2
    return {
        "prompt_embeds": pipe.encode_prompt([[caption(story, k) for k in range(3)]]),
        "negative_prompt_embeds": pipe.encode_prompt([[""] * 3]),
        "context_latents": pipe.encode_context(rendered, frames, config.height, config.width),
        **{"height": config.height, "width": config.width, "num_frames": config.num_frames},
    }


def sample(pipe: Mask2DiTPipeline, config: TrialConfig, arguments: dict, settings: dict, seed: int) -> torch.Tensor:
    """Latents of all three scenes, (1, 3*F, C, h, w)."""
    settings = dict(settings)
    with step_cache(pipe, settings.pop("cache", None), num_steps=config.num_inference_steps):
        return pipe(
            **arguments,
            **settings,
            scene_mask=GENERATED,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=generator_for(config.seed, seed),
            output_type="latent",
        ).frames


def run(config: TrialConfig, rows: list[str], record: Path | None = None) -> dict[str, list[dict]]:
    """Measures every story in every row, and writes the record after each story."""
    pipe = Mask2DiTPipeline.from_pretrained(config.model, torch_dtype=getattr(torch, config.dtype))
    pipe.scheduler = select_sampler(pipe.scheduler, "dpm")
    pipe.set_progress_bar_config(disable=True)
    counter = Counter(pipe.transformer)
    measured: dict[str, list[dict]] = defaultdict(list)
    for number in range(config.num_stories):
        seed = FIRST_STORY[config.stories] + number
        arguments = given_scenes(pipe, config, seed)
        context, exact = None, None
        for row in rows:
            counter.tokens, flops = 0, None
            started = time.process_time()
            latents = sample(pipe, config, arguments, ROWS[row], seed)
            seconds, tokens = time.process_time() - started, counter.tokens
            if number == 0:
                with FlopCounterMode(display=False) as flop_counter:
                    sample(pipe, config, arguments, ROWS[row], seed)
                flops = flop_counter.get_total_flops()
            of_scenes = latents.chunk(3, dim=1)
            if context is None:
                context, exact = (
                    pipe.decode_latents(torch.cat(of_scenes[:2], dim=1), [len(of_scenes[0][0])] * 2),
                    latents,
                )
            video = np.concatenate([context, pipe.decode_latents(of_scenes[2], [len(of_scenes[2][0])])], axis=1)
            story = measure_video(config, seed, to_uint8(video[0]))
            distance = (latents - exact).float().chunk(3, dim=1)[2].square().mean().sqrt().item()
            measured[row].append({**story, "seconds": seconds, "tokens": tokens, "flops": flops, "distance": distance})
        print(f"story {number + 1} of {config.num_stories}", file=sys.stderr, flush=True)
        if record:
            values = {"config": dataclasses.asdict(config), "torch": torch.__version__, "stories": measured}
            write_text(record, json.dumps(values, indent=1))
    return measured


def table(measured: dict[str, list[dict]]) -> str:
    """The table in Markdown."""
    first = next(iter(measured.values()))
    lines = []
    for row, stories in measured.items():
        seconds = [story["seconds"] / exact["seconds"] for story, exact in zip(stories, first, strict=True)]
        lines.append(
            [
                row,
                f"{sum(story['tokens'] for story in stories) / sum(story['tokens'] for story in first):.2f}",
                f"{stories[0]['flops'] / first[0]['flops']:.2f}",
                f"{np.median(seconds):.2f}",
                _interval([np.mean(story["right"]) for story in stories]),
                _interval([story["consistency"] for story in stories]),
                f"{np.sqrt(np.mean([story['distance'] ** 2 for story in stories])):.2g}",
            ]
        )
    heads = ["", "tokens", "FLOPs", "time", "scenes right", "consistency", "distance"]
    return markdown_table(heads, lines)


def _interval(values) -> str:
    interval = mean_interval([float(value) for value in values])
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def parse_args(argv: list[str]) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--model", default=TrialConfig.model)
    parser.add_argument("--stories", choices=list(FIRST_STORY), default="tuning")
    parser.add_argument("--num-stories", type=int, default=24)
    parser.add_argument("--split", choices=["train", "held_out"], default="train")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write settings and all measurements here")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    config = TrialConfig(
        model=args.model,
        task="extension",
        stories=args.stories,
        num_stories=args.num_stories,
        split=args.split,
        num_inference_steps=args.steps,
        dtype=args.dtype,
    )
    measured = run(config, args.rows, args.json)
    print(
        f"{config.num_stories} {config.stories} stories ({config.split}), {args.steps} steps of DPM, {config.dtype}\n"
    )
    print(table(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
