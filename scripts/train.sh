#!/usr/bin/env bash
# Trains on one or several machines: bash scripts/train.sh CONFIG.yaml [key=value ...]
#
#   GPU_NUM_PER_NODE  processes on this machine (the number of its GPUs, or 1 without a GPU)
#   NNODES            number of machines (1)
#   NODE_RANK         index of this machine, from 0 (0)
#   MASTER_ADDR       address of the first machine (127.0.0.1)
#   PORT              a free port on the first machine (29500)
set -euo pipefail

gpus=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
exec python -m mask2dit.training.launch \
  --nnodes "${NNODES:-1}" \
  --node_rank "${NODE_RANK:-0}" \
  --nproc_per_node "${GPU_NUM_PER_NODE:-$gpus}" \
  --master_addr "${MASTER_ADDR:-127.0.0.1}" \
  --master_port "${PORT:-29500}" \
  -m mask2dit.training "$@"
