# shellcheck shell=bash
# What the batch scripts share. Needs `root`, the repository. Sourced, never run.
set -uo pipefail
shopt -s nullglob   # no log is no log, not one named *
# A task of an array is addressed by both numbers: the last one's SLURM_JOB_ID is the array's own, and means all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-none}} restart=${SLURM_RESTART_COUNT:-0}
say() { echo "$(date '+%F %T') job $job.$restart: $*"; }
die() { echo "error: $*" >&2; exit 2; }

cd "${root:?}" || exit 2
# shellcheck source=slurm/env.sh
. "$root/slurm/env.sh" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || die "this is no Slurm job: submit the script with sbatch, or run it within salloc"

# --- The allocation ---------------------------------------------------------------------------------------------------
# One task per GPU, without GPUs one per node, unless the submission says how many. Told to, by --ntasks-per-node, Slurm
# would give a job with a range of nodes the fewest of them, however many are free.
nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-0} / nodes))}
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] || [ $((per_node * nodes)) = "${SLURM_NTASKS:-0}" ] ||
  die "$SLURM_NTASKS tasks on $nodes nodes are not the same number on each: submit with --ntasks-per-node"
asked=${SLURM_GPUS_PER_NODE:-} asked=${asked##*:}              # 8 of h100:8; a job alone on its nodes sees all GPUs
if [ "$asked" = 0 ]; then                                      # without GPUs, though a node taken whole shows them
  gpus=0
  export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu WITHOUT_GPUS=yes
fi
[ "$per_node" -gt 0 ] || per_node=$((gpus > 0 ? ${asked:-$gpus} : 1))
on_node=${SLURM_CPUS_ON_NODE:-${SLURM_JOB_CPUS_PER_NODE:-1}}   # salloc sets the second alone: 64(x2)
world=$((nodes * per_node)) cpus=${SLURM_CPUS_PER_TASK:-$((${on_node%%[!0-9]*} / per_node))}
[ "$cpus" -gt 0 ] || cpus=1
[ "$gpus" = 0 ] || [ "$per_node" -le "$gpus" ] ||
  die "--ntasks-per-node=$per_node, but the job has $gpus GPUs per node: one task per GPU"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)   # lists of mixed names need Slurm's own parser

# --- Software ---------------------------------------------------------------------------------------------------------
[ ! -d "$VENV/bin" ] || PATH=$(cd "$VENV" && pwd)/bin:$PATH
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONFAULTHANDLER=1   # stacks on stderr when native code crashes
ulimit -S -c 0   # those who hang are ended by SIGABRT, which must not write all their memory to a file
# shellcheck source=slurm/container.sh
. "$root/slurm/container.sh" || exit 2

# --- Rendezvous and network -------------------------------------------------------------------------------------------
export MASTER_ADDR=$head LAUNCHER LOCAL_WORLD_SIZE=$per_node NODE_NAMES
NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
# A free port of the first node, drawn, so that jobs which start there together differ. Below 32768, where ports that the
# kernel hands out begin; sockets of an earlier start may linger, and count as taken.
sockets=(cat /proc/net/tcp /proc/net/tcp6)
[ "${SLURMD_NODENAME:-}" = "$head" ] || sockets=(srun --overlap -N1 -n1 -w "$head" "${sockets[@]}")   # within salloc
taken=$("${sockets[@]}" 2>/dev/null)
for ((;;)); do
  port=$((15000 + RANDOM % 17000))
  grep -qi ":$(printf %04X "$port") " <<<"$taken" || break
done
export MASTER_PORT=$port
if [ -n "$NETWORK_INTERFACE" ]; then
  export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
  MASTER_ADDR=$(srun --overlap -N1 -n1 -w "$head" ip -4 -o addr show dev "$NETWORK_INTERFACE" |
    awk '{ sub("/.*", "", $4); print $4; exit }')
  [ -n "$MASTER_ADDR" ] || die "NETWORK_INTERFACE=$NETWORK_INTERFACE has no IPv4 address on $head: see ip addr there"
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                          # silent unless something is wrong
export DEEPSPEED_TIMEOUT TORCH_NCCL_ENABLE_MONITORING TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC TORCH_NCCL_ASYNC_ERROR_HANDLING
export TORCH_FR_BUFFER_SIZE TORCH_NCCL_DUMP_ON_TIMEOUT
for name in NCCL_IB_HCA NCCL_NET_GDR_LEVEL NCCL_IB_GID_INDEX FI_PROVIDER FI_EFA_USE_DEVICE_RDMA; do
  [ -z "${!name:-}" ] || export "${name?}"                     # presets of FABRIC; an empty one would be a setting, too
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}               # else each rank would start a thread per core of the node
export TRAIN_DEADLINE_MARGIN TRAIN_SILENCE_SECONDS NODE_SCRATCH

# shellcheck source=slurm/processes.sh
. "$root/slurm/processes.sh" || exit 2
# shellcheck source=slurm/requeue.sh
. "$root/slurm/requeue.sh" || exit 2
