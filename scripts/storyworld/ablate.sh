#!/usr/bin/env bash
# One of the paper's ablations in the small world: bash scripts/storyworld/ablate.sh variants|stages|thresholds|conditional
# It needs what scripts/storyworld/train_all.sh left: films, the first model folder and the caches. Started again, it goes on
# where it was. As the paper's runs start from CogVideoX, all of these start from one model of single scenes, and every row
# has the same number of steps; the tables are in docs/storyworld.md.
#
#   PYTHON     the interpreter (python)
#   PROCESSES  that train together: GPUs, or cores without one (2)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
configs=configs/storyworld
outputs=outputs/storyworld
runs=$outputs/ablations
films=datasets/storyworld_drifting
base=3000       # steps of the model of single scenes
steps=900       # of a row: 300 of pre-training and 600 of fine-tuning, where it has both
pretraining=300
decay=200       # of a row's steps the last ones, over which the learning rate falls

# train NAME CONFIG KEY=VALUE...: a run, unless it is done.
train() {
  local name=$1 config=$2 resume=null
  shift 2
  [ -d "$runs/$name/model" ] && return
  compgen -G "$runs/$name/checkpoint-*" > /dev/null && resume=latest
  "$python" -m mask2dit.training.launch "--nproc_per_node=${PROCESSES:-2}" -m mask2dit.training \
    "$configs/$config.yaml" "output_dir=$runs/$name" "resume=$resume" validation.every=0 checkpoint_every=300 \
    decay_steps=0 "$@"
}

# tune NAME START KEY=VALUE...: fine-tuning from another run, and the stories that it then makes.
tune() {
  local name=$1 start=$2
  shift 2
  train "$name" sft "model=$runs/$start/model" max_steps=$((steps - pretraining)) decay_steps=$decay "$@"
  stories "$name"
}

# stories NAME: what a run's model makes of 32 held-out stories.
stories() {
  for task in fixed extension; do
    "$python" -m mask2dit.storyworld.trial task=$task "model=$runs/$1/model" num_stories=32 \
      sampler=ddim num_inference_steps=30 "output_dir=$runs/$1/trials/$task"
  done
}

# pretrain VARIANT: from the model of single scenes, for which masks make no difference. Its batch has as many scenes as that of
# three-scene stories.
pretrain() {
  train base pretrain data.num_scenes=1 batch_size=24 micro_batch_size=12 max_steps=$base
  train "pretraining_$1" pretrain "model=$runs/base/model" "mask_variant=$1" max_steps=$pretraining
}

case "${1:-}" in
  variants)
    for variant in v1 v2 v3 v4 v5; do
      pretrain $variant
      tune $variant pretraining_$variant
    done
    ;;
  stages)
    pretrain v2
    tune v2 pretraining_v2
    train pretraining_only pretrain "model=$runs/base/model" max_steps=$steps decay_steps=$decay
    stories pretraining_only
    train tuning_only sft "model=$runs/base/model" max_steps=$steps decay_steps=$decay
    stories tuning_only
    ;;
  thresholds)
    [ -f $films/sft_0.8.json ] || "$python" -m mask2dit.storyworld.films $configs/films.yaml output_dir=$films seed=20000 \
      num_clips=0 num_held_out=0 drifting_share=0.5 'thresholds=[0.6,0.7,0.8]'
    "$python" -m mask2dit.data.cache $configs/cache.yaml data.manifest=$films/sft.json data.cache=$outputs/cache/drifting
    pretrain v2
    for threshold in 0.0 0.6 0.7 0.8; do
      manifest=$films/sft_$threshold.json
      [ $threshold = 0.0 ] && manifest=$films/sft.json
      tune threshold_$threshold pretraining_v2 "data.manifest=$manifest" data.cache=$outputs/cache/drifting
    done
    ;;
  conditional)
    pretrain v2
    tune v2 pretraining_v2
    tune unconditional pretraining_v2 conditional_probability=0
    ;;
  *)
    echo "usage: bash scripts/storyworld/ablate.sh variants|stages|thresholds|conditional" >&2
    exit 2
    ;;
esac
"$python" -m mask2dit.storyworld.report
