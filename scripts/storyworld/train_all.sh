#!/usr/bin/env bash
# Trains the small world's model from scratch: films, autoencoder, text encoder, cached latents, pre-training, fine-tuning in
# three parts. The result is models/storyworld. Started again, it continues where it stopped and reuses completed parts.
#
# On two cores with bfloat16 instructions, the autoencoder took 19 minutes, the transformer 322, and the films and latents of the
# last part 20. Cores without them compute bfloat16 far more slowly than float32: there, set precision: fp32 (and for the
# transformer optimizer: adamw) in configs/storyworld, and dtype: float32 in cache.yaml.
#
#   PYTHON     the interpreter (python)
#   PROCESSES  training processes: GPUs, or cores without a GPU (2)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
configs=configs/storyworld
outputs=outputs/storyworld

# train NAME: trains with the configuration of that name unless its model exists, from its last checkpoint if there is one.
train() {
  [ -d "$outputs/$1/model" ] && return
  "$python" -m mask2dit.training.launch "--nproc_per_node=${PROCESSES:-2}" -m mask2dit.training \
    "$configs/$1.yaml" resume=auto
}

[ -f datasets/storyworld/held_out.json ] || "$python" -m mask2dit.storyworld.films "$configs/films.yaml"
[ -d "$outputs/vae/vae" ] || "$python" -m mask2dit.storyworld.vae "$configs/vae.yaml"
[ -d "$outputs/text/text_encoder" ] || "$python" -m mask2dit.storyworld.text "$configs/text.yaml"
[ -d "$outputs/model" ] || "$python" -m mask2dit.storyworld.build "$configs/model.yaml"
"$python" -m mask2dit.data.cache "$configs/cache.yaml" data.kind=pretrain \
  data.manifest=datasets/storyworld/pretrain.csv "data.cache=$outputs/cache/pretrain"
"$python" -m mask2dit.data.cache "$configs/cache.yaml"
train pretrain
train sft
# The second part of fine-tuning: other stories, whose captions leave out colours and settings.
unnamed=datasets/storyworld/unnamed
[ -f "$unnamed/sft.json" ] || "$python" -m mask2dit.storyworld.films "$configs/films.yaml" "output_dir=$unnamed" \
  num_stories=4500 num_clips=0 num_held_out=0 seed=20000 unnamed_colours=0.5 unnamed_settings=0.3
"$python" -m mask2dit.data.cache "$configs/cache.yaml" "data.manifest=$unnamed/sft.json" "data.cache=$outputs/cache/unnamed"
train refine
# The last part: stories with more actors.
casts=datasets/storyworld/casts
[ -f "$casts/sft.json" ] || "$python" -m mask2dit.storyworld.films "$configs/films.yaml" "output_dir=$casts" \
  num_stories=14000 num_clips=0 num_held_out=0 seed=30000 "cast_shares=[0.3,0.35,0.35]" unnamed_colours=0.35 \
  unnamed_settings=0.2
"$python" -m mask2dit.data.cache "$configs/cache.yaml" "data.manifest=$casts/sft.json" "data.cache=$outputs/cache/casts"
train casts
"$python" -m mask2dit.storyworld.build "$configs/model.yaml" "trained=$outputs/casts/model" output=models/storyworld
