#!/usr/bin/env bash
# Trains on queued slices of Cloud TPUs, one process a host: scripts/launch_tpu.sh --config configs/gpt2.py
# Edit these; the run's folder and the data are on a disk or bucket mounted at the same place on every host.
project=my-project zone=us-east5-b name=jaxgpt
accelerator=v6e-64 runtime=v2-alpha-tpuv6e slices=1 # several are joined by the data-center network: mesh_data over them
repository=https://github.com/you/jaxgpt.git mount='mountpoint -q /shared'
#
# The first call queues the slices, waits until they are there and sets up every host; a later one only starts the run,
# which goes on from its last checkpoint. To give the slices back:
#   gcloud compute tpus queued-resources delete jaxgpt --project my-project --zone us-east5-b --force
set -euo pipefail

at=(--project "$project" --zone "$zone")
node=(--node-id "$name") nodes=("$name")
if [ "$slices" -gt 1 ]; then
    node=(--node-count "$slices" --node-prefix "$name") nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
on_all_hosts() {
    local jobs=() status=0
    for slice in "${nodes[@]}"; do
        gcloud compute tpus tpu-vm ssh "$slice" "${at[@]}" --worker=all --command="$1" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || status=$?; done
    return $status
}

if ! gcloud compute tpus queued-resources describe "$name" "${at[@]}" >/dev/null 2>&1; then
    gcloud compute tpus queued-resources create "$name" "${at[@]}" "${node[@]}" \
        --accelerator-type "$accelerator" --runtime-version "$runtime"
fi
while state=$(gcloud compute tpus queued-resources describe "$name" "${at[@]}" --format='value(state.state)'); do
    case $state in
    ACTIVE) break ;;
    FAILED | SUSPEND*) echo "error: $name is $state; delete it, as above, and start again" >&2 && exit 2 ;;
    esac
    echo "$name is $state, waiting for $accelerator in $zone" >&2
    sleep 60
done
python='command -v python3.11 >/dev/null || { sudo apt-get -qq update; sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y python3.11-venv; }; export PYTHON=python3.11'
on_all_hosts "set -e; $mount; [ -d jaxgpt ] || git clone $repository jaxgpt; cd jaxgpt; $python; scripts/setup tpu"
# jax.distributed finds the hosts by itself; nothing but process 0 writes to stdout
on_all_hosts "cd jaxgpt && .venv/bin/python -m jaxgpt.train $(printf '%q ' "$@") --config.init_from=auto"
