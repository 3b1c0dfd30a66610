#!/bin/bash
# One process of a job: takes its rank from the launcher and becomes the command given.
# A signal that arrives while Python starts would kill it; ignored signals stay ignored until it installs handlers.
trap '' USR1
[ "${TERM_ENDS:-no}" = yes ] || trap '' TERM
if [ "$LAUNCHER" = mpirun ]; then
  # Variables of srun are those of MPI's own daemons here.
  export RANK=$OMPI_COMM_WORLD_RANK LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE
  exec >>"$LOG_STEM.$RANK.log" 2>&1
else
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
fi
[ "${WITHOUT_GPUS:-no}" = no ] || export CUDA_VISIBLE_DEVICES=''   # which srun has set again
ulimit -S -c 0                                                 # as lib.sh, where it is not passed on
export TRAIN_INCIDENTS=$LOG_STEM.$RANK.jsonl                   # beside its log, see trainer/cluster/incidents.py
exec "$@"
