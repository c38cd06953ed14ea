#!/bin/bash
# A run on GPUs of a SLURM cluster: sbatch experiments/launch/slurm.sh, where README.md put the repository
#SBATCH --job-name=jaxalign
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
# tasks: one a GPU, for --distributed=auto gives process i of a node its GPU i. Without --gpus-per-task or --gpu-bind: each sees all
# signal: before the time is up, to the processes and not to this script. They save, within 30 s, and end with 143
# requeue: SLURM itself starts a job again that was preempted or lost a node

export JAX_COMPILATION_CACHE_DIR=/shared/jax-cache HF_HOME=/shared/huggingface
. /shared/venv/bin/activate

cancelled=no
trap 'cancelled=yes' TERM # by scancel, or preemption; bash goes on behind srun

# wait: the others see within 30 s that a process has ended, and end of themselves
srun --kill-on-bad-exit=0 --wait=120 \
  python -m experiments.ppo --config=configs/ppo.py:llama3_8b --workdir=/shared/runs/ppo --distributed=auto
code=$?

case $code in
  70 | 75 | 134 | 143) # stuck, another process has ended, out of time: the same command goes on
    if [[ $cancelled == no && ${SLURM_RESTART_COUNT:-0} -lt 100 ]]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $code
