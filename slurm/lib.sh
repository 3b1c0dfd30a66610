# shellcheck shell=bash
# What the batch scripts share. Needs `root`, the repository. Sourced, never run.
set -uo pipefail
shopt -s nullglob   # no log is no log, not one named *
say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID:-none}.${SLURM_RESTART_COUNT:-0}: $*"; }
die() { echo "error: $*" >&2; exit 2; }

cd "${root:?}" || exit 2
# shellcheck source=slurm/env.sh
. "$root/slurm/env.sh"
[ -n "${SLURM_JOB_ID:-}" ] || die "this is no Slurm job: submit the script with sbatch, or run it within salloc"
job=$SLURM_JOB_ID restart=${SLURM_RESTART_COUNT:-0}

# --- The allocation ---------------------------------------------------------------------------------------------------
# One task per GPU, without GPUs one per node, unless the submission says how many. Told to, by --ntasks-per-node, Slurm
# would give a job with a range of nodes the fewest of them, however many are free.
nodes=$SLURM_JOB_NUM_NODES gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-0} / nodes))}
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] || [ $((per_node * nodes)) = "${SLURM_NTASKS:-0}" ] ||
  die "$SLURM_NTASKS tasks on $nodes nodes are not the same number on each: submit with --ntasks-per-node"
asked=${SLURM_GPUS_PER_NODE:-} asked=${asked##*:}              # 8 of h100:8; a job alone on its nodes sees all GPUs
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
container=() in_srun=()
case $CONTAINER in
  none) ;;
  apptainer) container=(apptainer exec --nv --bind "$root${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" "$CONTAINER_IMAGE") ;;
  # On srun, not on sbatch: the script itself has to call Slurm's commands, which containers lack.
  pyxis) in_srun=("--container-image=$CONTAINER_IMAGE" --no-container-mount-home
                  "--container-mounts=$root:$root${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" "--container-workdir=$root") ;;
  *) die "CONTAINER=$CONTAINER is unknown: use none, apptainer or pyxis" ;;
esac

# on_head COMMAND...: run it once, with the job's software.
on_head() {
  if [ "$CONTAINER" = pyxis ]; then srun --overlap -N1 -n1 -w "$head" "${in_srun[@]}" "$@"; else "${container[@]}" "$@"; fi
}

# --- Rendezvous and network -------------------------------------------------------------------------------------------
export MASTER_ADDR=$head LAUNCHER LOCAL_WORLD_SIZE=$per_node NODE_NAMES
NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
# Jobs that share a node differ in their ports, and a restart differs from the start whose sockets may linger. Below
# 32768, where ports that the kernel hands out begin.
export MASTER_PORT=$((15000 + (job * 10 + restart % 10) % 10000))
if [ -n "$NETWORK_INTERFACE" ]; then
  export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
  MASTER_ADDR=$(srun --overlap -N1 -n1 -w "$head" ip -4 -o addr show dev "$NETWORK_INTERFACE" |
    awk '{ sub("/.*", "", $4); print $4; exit }')
  [ -n "$MASTER_ADDR" ] || die "NETWORK_INTERFACE=$NETWORK_INTERFACE has no IPv4 address on $head: see ip addr there"
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                          # silent unless something is wrong
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}      # remember the last collectives of each rank ...
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}   # ... and write them down when one hangs
export DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-20}              # minutes; reading a large checkpoint keeps others waiting
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}               # else each rank would start a thread per core of the node
export TRAIN_DEADLINE_MARGIN TRAIN_SILENCE_SECONDS NODE_SCRATCH

# --- Starting processes and telling them to stop -----------------------------------------------------------------------
step='' told=0 ended_by_slurm=0 code=0
warning=USR1   # what a warning is to the processes: trainer.train saves and ends
# launch LOGS OPTIONS -- COMMAND...: start it on every task, logs in LOGS/JOB.RESTART.RANK.log; $step is the launcher.
# OPTIONS are srun's: whether one failing task ends the others is the script's to say.
launch() {
  local logs=$1 options=() process extra
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  export LOG_STEM=$logs/$job.$restart TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$logs/$job.$restart.collectives_
  process=(bash "$root/slurm/task.sh" "${container[@]}" "$@")
  read -r -a extra <<<"$SRUN_ARGS"
  case $LAUNCHER in
    # Since Slurm 22.05 srun does not inherit --cpus-per-task; without it all threads of a task share one core.
    srun) srun --nodes="$nodes" --ntasks="$world" --ntasks-per-node="$per_node" --cpus-per-task="$cpus" \
            --cpu-bind="$CPU_BIND" --output="$LOG_STEM.%t.log" --open-mode=append "${options[@]}" "${extra[@]}" \
            "${in_srun[@]}" "${process[@]}" & ;;
    mpirun) mpirun -np "$world" --map-by "ppr:$per_node:node" --bind-to none "${process[@]}" & ;;
    *) die "LAUNCHER=$LAUNCHER is unknown: use srun or mpirun" ;;
  esac
  step=$!
  [ "$told" = 0 ] || relay                                     # the warning came before there was anyone to tell
}

# await: until the processes have ended; $code is the launcher's, which says little (srun may report a victim's).
await() {
  while :; do
    wait "$step"
    # shellcheck disable=SC2034  # the scripts read it
    code=$?
    kill -0 "$step" 2>/dev/null || break                       # a trap ends `wait` early
  done
  step=''
}

# A warning goes on to the processes, again and again: one that is just starting ignores it.
warned() {
  [ "$told" = 0 ] || return 0
  told=1
  say "asked to stop: telling the processes"
  [ -z "$step" ] || relay
}
relay() {
  while kill -0 "$step" 2>/dev/null; do
    if [ "$LAUNCHER" = mpirun ]; then kill -s "$warning" "$step"; else scancel --signal="$warning" "$job"; fi
    sleep 5
  done 2>/dev/null &
}
# TERM comes when Slurm itself ends the job (scancel, an administrator's requeue, a dead node), and tells the tasks, too.
terminated() { ended_by_slurm=1; say "Slurm ends this start"; }
trap warned USR1 INT
trap terminated TERM

# --- Back into the queue ------------------------------------------------------------------------------------------------
# again [RUN]: requeue this job, without the nodes that RUN knows as bad, and leave.
again() {
  local folder=${1:-} first='' exclude='' reason
  trap '' TERM USR1                                            # requeueing ends this very script
  reason=$(scontrol show job -o "$job" | sed -n 's/.* Reason=\([^ ]*\).*/\1/p')
  if [ "$ended_by_slurm" = 1 ] && [ "$reason" != TimeLimit ]; then
    say "ended by Slurm, which decides whether it starts again"; exit 143
  fi
  if [ "$REQUEUE" != yes ] || [ "${ENVIRONMENT:-}" != BATCH ]; then
    say "to be continued: submit the same command again (exit code 75)"; exit 75
  fi
  if [ -n "$folder" ]; then
    # What the user excluded stays excluded.
    [ -e "$folder/logs/$job.exclude" ] || scontrol show job -o "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p' |
      sed 's/^(null)$//' >"$folder/logs/$job.exclude"
    first=$(cat "$folder/logs/$job.exclude")
    exclude=$(on_head python -m trainer.cluster exclude "$folder" --needed "$nodes" --available \
      "$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,mix,alloc,comp -o %N | sort -u | paste -sd,)")
    exclude=$first${first:+${exclude:+,}}$exclude
  fi
  scontrol requeue "$job" || { say "requeueing is refused here: set REQUEUE=no in slurm/env.sh and chain jobs"; exit 75; }
  [ -z "$folder" ] || scontrol update JobId="$job" ExcNodeList="$exclude"   # Slurm takes it only now
  say "back in the queue${exclude:+, without $exclude}"
  exit 0
}
