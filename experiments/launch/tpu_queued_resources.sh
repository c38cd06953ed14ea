#!/usr/bin/env bash
# A run on spot TPUs from Cloud TPU's queue. A slice that is taken away is asked for again, and the run goes on.
#
#     PROJECT=... ZONE=... NFS=10.0.0.2:/share bash experiments/launch/tpu_queued_resources.sh
#
# Start it where it can stay as long as the run (a small VM, in tmux). NFS is a Filestore share in the network of the TPUs, with
# what README.md puts there. Runtimes: v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e.
set -uo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${NFS:?}" "${NAME:=jaxalign}" "${TYPE:=v5litepod-256}" "${RUNTIME:=v2-alpha-tpuv5-lite}"

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"; }
state() { queue describe --format="value(state.state)" 2>/dev/null || echo NONE; }
everywhere() { queue ssh --node=all --worker=all --command="$1"; }

MOUNT="sudo mkdir -p /shared && (mountpoint -q /shared || (sudo apt-get install -qy nfs-common && sudo mount $NFS /shared))"
# 70, 75, 134: stuck, or another process has ended. All processes then end, and are started again here
read -r -d '' RUN <<'RUN'
cd /shared/jaxalign && . /shared/venv/bin/activate
export JAX_COMPILATION_CACHE_DIR=/shared/jax-cache HF_HOME=/shared/huggingface
for try in {1..20}; do
  python -m experiments.ppo --config=configs/ppo.py:llama3_8b --workdir=/shared/runs/ppo --distributed=auto
  code=$?
  case $code in 70 | 75 | 134) sleep 10 ;; *) exit $code ;; esac
done
exit $code
RUN

while true; do
  until [[ $(state) == ACTIVE ]]; do
    case $(state) in
      NONE) queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot || exit ;;
      SUSPENDED | FAILED) queue delete --force --quiet || exit ;;
    esac
    sleep 60
  done
  everywhere "$MOUNT" && everywhere "$RUN" && exit
  code=$?
  sleep 120 # until a slice that was taken away says so
  [[ $(state) == ACTIVE ]] && exit $code # it was not: the run itself has ended, and has said why
done
