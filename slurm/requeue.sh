# shellcheck shell=bash disable=SC2154
# Back into the queue. Sourced by lib.sh, which sets the variables.
REQUEUE_SECONDS=600   # a controller that restarts or fails over is gone for minutes

# later COMMAND...: its output, tried again until Slurm answers. Without `timeout`, which the TERM that a requeue sends to
# all of this job would end before it has passed the answer on; Slurm's commands give up by themselves within a minute.
later() {
  local end=$((SECONDS + REQUEUE_SECONDS)) told_so=no said
  for ((;;)); do
    if said=$("$@" 2>&1); then echo "$said"; return 0; fi
    case $said in
      # Slurm's own answers; everything else is no answer, of a controller that is down, busy or fails over.
      *denied* | *disabled* | *"already finished"* | *"Invalid job id"* | *"Only batch jobs"*) echo "$said"; return 1 ;;
      *"pending execution"*) return 0 ;;                       # the try before got through, its answer did not
    esac
    [ $SECONDS -lt $end ] || break
    [ "$told_so" = yes ] || say "Slurm does not answer, trying again for $((REQUEUE_SECONDS / 60)) minutes: $said" >&2
    told_so=yes
    sleep 10
  done
  echo "$said"
  return 2
}

# shown NAME: a field of this job, once the controller answers.
shown() { later scontrol show job -o "$job" | grep -o " $1=[^ ]*" | head -n 1 | cut -d= -f2; }

# excluded RUN: the nodes to leave out of the next start, with commas: the user's, and those that RUN knows as bad.
excluded() {
  local mine="$1/logs/$job.exclude" first bad
  if [ ! -e "$mine" ] && first=$(shown ExcNodeList); then      # what the user excluded stays excluded
    echo "${first#(null)}" >"$mine"
  fi
  bad=$(timeout -k 5 60 "${on_head[@]}" python -m trainer.cluster exclude "$1" --needed "$nodes" --available \
    "$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,mix,alloc,comp -o %N | sort -u | paste -sd,)")
  paste -sd, <(cat "$mine" 2>/dev/null; echo "$bad") | sed 's/,,*/,/g; s/^,//; s/,$//'
}

# again [RUN]: requeue this job, without the nodes that RUN knows as bad, and leave.
again() {
  local folder=${1:-} exclude='' said
  trap '' TERM USR1                                            # requeueing ends this very script
  if [ "$ended_by_slurm" = 1 ] && [ "$(shown Reason)" != TimeLimit ]; then
    say "ended by Slurm, which decides whether it starts again"; exit 143
  fi
  if [ "$REQUEUE" != yes ] || [ "${ENVIRONMENT:-}" != BATCH ]; then
    say "to be continued: submit the same command again (exit code 75)"; exit 75
  fi
  [ -z "$folder" ] || exclude=$(excluded "$folder")
  said=$(later scontrol requeue "$job")
  case $? in
    1) say "requeueing is refused here ($said): set REQUEUE=no in slurm/env.sh and chain jobs"; exit 75 ;;
    2) say "not requeued, as Slurm did not answer ($said): submit the same command again (exit code 75)"; exit 75 ;;
  esac
  if [ -n "$folder" ]; then                                    # Slurm takes it only now
    later scontrol update JobId="$job" ExcNodeList="$exclude" || say "the next start may use ${exclude:-any node}, too"
  fi
  say "back in the queue${exclude:+, without $exclude}"
  exit 0
}
