#!/bin/bash
#SBATCH --job-name=flux-ft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Trains a run file on one machine or several, one flux-ft on each, a process per GPU:
#
#   sbatch scripts/slurm_train.sh RUN.yaml [key=value …]                1 × 8 GPUs
#   sbatch --nodes 4 scripts/slurm_train.sh RUN.yaml [key=value …]      4 × 8 GPUs
#   sbatch --nodes 2 --gpus-per-node 4 --time 04:00:00 scripts/slurm_train.sh RUN.yaml
#
# The run folder, the model and the pictures must lie where all machines see them, and flux-ft must be on PATH: activate
# its environment before sbatch. Ten minutes before the job's time is up (MARGIN_S), when Slurm takes the machines back,
# or after `scancel --signal=TERM JOB`, the run is saved, and the job queued again to go on from there. REQUEUE=no in
# the environment leaves that to you; `sbatch … RUN.yaml --resume` goes on.
#
# Captions, cache and, after the last step, extraction and export are not cut short by MARGIN_S: the signal ends them. The
# queued job keeps what is cached, and makes the export anew. Where that takes M seconds, leave room for it by
# MARGIN_S=M+120 in the environment and `sbatch --signal=TERM@60`.
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch [--nodes N] slurm_train.sh RUN.yaml [key=value …]" >&2
    exit 2
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
NNODES=$SLURM_JOB_NUM_NODES
STOPPED=$PWD/.flux-ft-$SLURM_JOB_ID.stopped
SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export MASTER_ADDR MASTER_PORT NNODES STOPPED SRUN_CPUS_PER_TASK

words=("$@" --gpus "${SLURM_GPUS_ON_NODE:-8}")
if [ -n "${SLURM_JOB_END_TIME:-}" ]; then
    left=$((SLURM_JOB_END_TIME - $(date +%s) - ${MARGIN_S:-600}))
    words+=(--max-time "$((left > 0 ? left : 1))s")
fi
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [[ " $* " != *" --resume "* ]]; then
    words+=(--resume)
fi

on_each_machine='
    trap : TERM INT # flux-ft hears them too, and we wait for it
    NODE_RANK=$SLURM_NODEID flux-ft train "$@"
    code=$?
    # As a failure it would have srun end the machines that are not so far yet.
    if [ "$code" -eq 130 ]; then touch "$STOPPED" && code=0; fi
    exit "$code"
'
rm -f "$STOPPED"
srun --kill-on-bad-exit=1 bash -c "$on_each_machine" flux-ft "${words[@]}"
code=$?
if [ "$code" -eq 0 ] && [ -e "$STOPPED" ]; then
    code=130
    if [ "${REQUEUE:-yes}" = yes ]; then
        echo "job $SLURM_JOB_ID is queued again" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
rm -f "$STOPPED"
exit "$code"
