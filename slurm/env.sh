# shellcheck shell=bash
# Everything that a site changes. The scripts of this folder source it; whatever is set in the environment
# of `sbatch` wins. Source it once before `sbatch`, too, if you set account or partition here.

# Account and queue: sbatch reads these itself.
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu SBATCH_CONSTRAINT=h100

# Software: modules, then a virtual environment (a path, or one relative to the repository; skipped if absent) ...
# module load cuda
: "${VENV:=.venv}"
# ... or a container: `none`, `apptainer` (runs `apptainer exec`) or `pyxis` (srun --container-image). An image that is no
# file (docker://...) is fetched once, into a .sif or .sqsh in CONTAINER_CACHE, a folder that all nodes see.
: "${CONTAINER:=none}" "${CONTAINER_IMAGE:=}" "${CONTAINER_CACHE:=$PWD/.images}"
# Folders the container sees besides the repository: data and runs, `/a:/a,/b:/b`.
: "${CONTAINER_MOUNTS:=}"

# How processes start: `srun` (one task each, the default) or `mpirun` (Open MPI inside the job).
: "${LAUNCHER:=srun}"
# Further options of srun, for example --mpi=pmix, or --gpu-bind=none.
: "${SRUN_ARGS:=}"
# Bind each task to its cores, so that data loading of one rank does not push another's off its cores, and its memory to
# the NUMA node of these cores. Where GPUs and cores do not go together by order (nvidia-smi topo -m, "NUMA Affinity"),
# name the NUMA node of each task: CPU_BIND=map_ldom:0,0,1,1. The doctor's column `bound` says what came of it.
: "${CPU_BIND:=cores}" "${MEM_BIND:=local}"

# Network interface for rendezvous and NCCL's bootstrap, for example ib0. Empty: what the host name resolves to.
: "${NETWORK_INTERFACE:=}"
# Preset of the fabric: `infiniband`, `roce`, `efa`, or empty for what NCCL finds by itself. What is set already wins.
: "${FABRIC:=}"
case $FABRIC in
  infiniband | roce)
    : "${NCCL_IB_HCA:=mlx5}"                                   # all whose names begin so; =mlx5_0,mlx5_3: these
    : "${NCCL_NET_GDR_LEVEL:=PHB}"                             # GPUs reach adapters of the same CPU without its memory
    [ "$FABRIC" = infiniband ] || : "${NCCL_IB_GID_INDEX:=3}" ;;   # RoCE v2: show_gids
  efa) : "${FI_PROVIDER:=efa}" "${FI_EFA_USE_DEVICE_RDMA:=1}" ;;   # needs the aws-ofi-nccl plug-in on LD_LIBRARY_PATH
  '') ;;
  *) echo "error: FABRIC=$FABRIC is unknown: use infiniband, roce, efa, or leave it empty" >&2; return 2 ;;
esac

# How hangs end. A collective that takes longer than DEEPSPEED_TIMEOUT (minutes; reading a large checkpoint keeps others
# waiting) ends its process; torch's watchdog first writes down each rank's last collectives. A watchdog that is itself
# stuck in the driver for TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC is ended by its monitor.
: "${DEEPSPEED_TIMEOUT:=20}" "${TORCH_NCCL_ENABLE_MONITORING:=1}" "${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:=600}"
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=3}"                      # 3: end the process at once
: "${TORCH_FR_BUFFER_SIZE:=2000}" "${TORCH_NCCL_DUMP_ON_TIMEOUT:=1}"   # so many collectives are remembered

# Where nodes keep fast local disks; recipes may name it in data.stage_dir.
: "${NODE_SCRATCH:=${TMPDIR:-/tmp}}"

# Where encode and eval keep the logs of their processes (train: RUN/logs).
: "${LOGS:=$PWD/slurm/logs}"

# May a job put itself back into the queue? `no`: chain jobs instead (README.md, "Without requeue").
: "${REQUEUE:=yes}"
# Adapt ep_size and batch arithmetic to the number of nodes of each start (trainer/engine/elastic.py).
: "${ELASTIC:=yes}"
# Check the nodes before training (trainer/doctor.py), and keep bad ones out for so long.
: "${DOCTOR:=yes}" "${BAD_NODE_HOURS:=24}"
# End so many seconds before the time limit, besides the time that a step and a save take.
: "${TRAIN_DEADLINE_MARGIN:=60}"
# Processes told to stop that have not ended after so many seconds, or when the job is about to end, are hung: their
# stacks are written down, they are killed, and the job is judged.
: "${STOP_SECONDS:=900}"
# A process that is silent for so many seconds counts as lost, and the others end.
: "${TRAIN_SILENCE_SECONDS:=60}"
