#!/bin/bash
# Primal-dual unlearning under SLURM with torchrun: data parallel, or ZeRO with --deepspeed FILE.json.
#
#   sbatch recipes/slurm/primal_dual_torchrun.sh recipes/primal_dual/tofu_forget10_llama-3.1-8b.yaml --seed 1
#
# Before the time limit, or when the job is pre-empted, SLURM sends SIGTERM: every process finishes its step, one
# checkpoint is saved, the run ends, and the job queues itself again and continues from there. OUTPUT names the
# folder (default outputs/JOB_ID), which all nodes must see.
#SBATCH --job-name=primal-dual
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# To the job steps, not to this script, 300 s before the limit: more than the longest step or evaluation plus one save.
#SBATCH --signal=TERM@300
set -euo pipefail

recipe=${1:?usage: sbatch primal_dual_torchrun.sh RECIPE.yaml [options of hf-unlearn primal-dual]}
shift
output=${OUTPUT:-outputs/$SLURM_JOB_ID}
if [[ -e $output/unlearning_state.json ]]; then # written with the final model
    echo "$output holds a finished run."
    exit 0
fi
resume=()
if compgen -G "$output/checkpoint-*/unlearning_state.json" >/dev/null; then # the last file of a complete checkpoint
    resume=(--resume_from_checkpoint true)
fi

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HEAD%%$'\n'*} # the first line; a pipe into head could end scontrol, and this script, by SIGPIPE
PORT=$((20000 + SLURM_JOB_ID % 10000))
GPUS=${SLURM_GPUS_ON_NODE:-8}
export HEAD PORT GPUS
# A launcher that gets the signal itself kills its workers 30 s later; newer versions of torch read a time from here.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280

# One launcher a node. The signal goes around it, straight to its workers: they end with exit code 0, and so does it.
# shellcheck disable=SC2016
on_each_node='
    setsid torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$GPUS" \
        --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" \
        -m hf_unlearn.cli.main primal-dual "$@" &
    launcher=$!
    trap "pkill -TERM -P $launcher" TERM
    while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
    wait "$launcher"
'
srun --kill-on-bad-exit=1 bash -c "$on_each_node" primal-dual \
    --config "$recipe" --output_dir "$output" "${resume[@]}" "$@"

# An error has ended this script above. Here the run is finished, or it was stopped and has saved its checkpoint.
if [[ ! -e $output/unlearning_state.json ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
