# shellcheck shell=bash
# Everything that a site changes. The scripts of this folder source it; whatever is set in the environment
# of `sbatch` wins. Source it once before `sbatch`, too, if you set account or partition here.

# Account and queue: sbatch reads these itself.
# export SBATCH_ACCOUNT=my-project SBATCH_PARTITION=gpu SBATCH_CONSTRAINT=h100

# Software: modules, then a virtual environment (a path, or one relative to the repository; skipped if absent) ...
# module load cuda
: "${VENV:=.venv}"
# ... or a container: `none`, `apptainer` (runs `apptainer exec`) or `pyxis` (srun --container-image).
: "${CONTAINER:=none}" "${CONTAINER_IMAGE:=}"
# Folders the container sees besides the repository: data and runs, `/a:/a,/b:/b`.
: "${CONTAINER_MOUNTS:=}"

# How processes start: `srun` (one task each, the default) or `mpirun` (Open MPI inside the job).
: "${LAUNCHER:=srun}"
# Further options of srun, for example --mpi=pmix, or --gpu-bind=none.
: "${SRUN_ARGS:=}"
# Bind each task to its cores, so that data loading of one rank does not push another's off its cores.
: "${CPU_BIND:=cores}"

# Network interface for rendezvous and NCCL's bootstrap, for example ib0. Empty: what the host name resolves to.
: "${NETWORK_INTERFACE:=}"
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
