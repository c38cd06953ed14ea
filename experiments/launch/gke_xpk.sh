#!/usr/bin/env bash
# A run on TPUs of a GKE cluster that xpk made; Kueue queues it, JobSet starts it again.
#
#     PROJECT=... ZONE=... CLUSTER=... bash experiments/launch/gke_xpk.sh
#
# Once for the cluster, the storage that all pods mount (README.md says what is put there):
#
#     xpk storage create shared --type=gcpfilestore --auto-mount=false --mount-point=/shared --readonly=false --size=2560 \
#       --tier=BASIC_SSD --vol=default --project=$PROJECT --zone=$ZONE --cluster=$CLUSTER
#
# xpk cannot tell the exit codes that ask for a restart from a mistake in the settings, so both are restarted.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${NAME:=jaxalign}" "${TYPE:=v5litepod-256}"

RUN="cd /shared/jaxalign && . /shared/venv/bin/activate &&
exec python -m experiments.ppo --config=configs/ppo.py:llama3_8b --workdir=/shared/runs/ppo --distributed=auto"

# the grace: SIGTERM saves within 30 s
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" \
  --tpu-type="$TYPE" --num-slices=1 --docker-image=python:3.12 --storage=shared \
  --max-restarts=20 --restart-on-user-code-failure --termination-grace-period-seconds=60 \
  --env=JAX_COMPILATION_CACHE_DIR=/shared/jax-cache --env=HF_HOME=/shared/huggingface --command="$RUN"
