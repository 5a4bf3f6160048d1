#!/usr/bin/env bash
# Runs one of the paper's ablations in the small world: bash scripts/storyworld/ablate.sh variants|stages|thresholds|conditional
# It needs the results of scripts/storyworld/train_all.sh: films, the first model folder and the caches. An interrupted run
# continues when started again. As the paper's runs start from CogVideoX, all of these start from one model of single scenes.
# Every row has the same number of steps; the tables are in docs/storyworld.md.
#
#   PYTHON     the interpreter (python)
#   PROCESSES  training processes: GPUs, or cores without a GPU (2)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
configs=configs/storyworld
outputs=outputs/storyworld
runs=$outputs/ablations
films=datasets/storyworld_drifting
base=3000       # steps of the model of single scenes
steps=900       # steps per row: 300 of pre-training and 600 of fine-tuning, where it has both
pretraining=300
decay=200       # last steps of a row, over which the learning rate falls

# train NAME CONFIG KEY=VALUE...: trains a run unless it is complete.
train() {
  local name=$1 config=$2
  shift 2
  [ -d "$runs/$name/model" ] && return
  "$python" -m mask2dit.training.launch "--nproc_per_node=${PROCESSES:-2}" -m mask2dit.training \
    "$configs/$config.yaml" "output_dir=$runs/$name" resume=auto validation.every=0 checkpoint_every=300 \
    decay_steps=0 "$@"
}

# tune NAME START KEY=VALUE...: fine-tunes another run, and generates stories with the result.
tune() {
  local name=$1 start=$2
  shift 2
  train "$name" sft "model=$runs/$start/model" max_steps=$((steps - pretraining)) decay_steps=$decay "$@"
  stories "$name"
}

# stories NAME: generates 32 held-out stories with a run's model.
stories() {
  for task in fixed extension; do
    "$python" -m mask2dit.storyworld.trial task=$task "model=$runs/$1/model" num_stories=32 \
      sampler=ddim num_inference_steps=30 "output_dir=$runs/$1/trials/$task"
  done
}

# pretrain VARIANT: pre-trains from the model of single scenes, for which masks make no difference. The single-scene batch has as
# many scenes as a batch of three-scene stories.
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
