# shellcheck shell=bash disable=SC2154
# Starting processes, telling them to stop, and ending those that do not. Sourced by lib.sh, which sets the variables.
step='' direct=no told=0 ended_by_slurm=0 code=0
warning=USR1   # what a warning is to the processes: trainer.train saves and ends
# Seconds before the job's end that showing stacks, the verdict and requeueing take.
LEAVE=45

# launch LOGS OPTIONS -- COMMAND...: start it on every task, logs in LOGS/JOB.RESTART.RANK.log; $step is the launcher.
# OPTIONS are srun's: whether one failing task ends the others is the script's to say. What the launcher itself says goes
# to JOB.RESTART.launcher, too: it alone may know what a process died of.
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
            --cpu-bind="$CPU_BIND" --mem-bind="$MEM_BIND" --output="$LOG_STEM.%t.log" --open-mode=append \
            "${options[@]}" "${extra[@]}" "${in_srun[@]}" "${process[@]}" 2> >(tee -a "$LOG_STEM.launcher" >&2) & ;;
    mpirun) mpirun -np "$world" --map-by "ppr:$per_node:node" --bind-to none "${process[@]}" \
              2> >(tee -a "$LOG_STEM.launcher" >&2) & ;;
    *) die "LAUNCHER=$LAUNCHER is unknown: use srun or mpirun" ;;
  esac
  step=$! direct=no
  if [ "$told" = 1 ]; then relay & fi                          # the warning came before there was anyone to tell
}

# beside COMMAND...: start it next to this script; a warning and Slurm's own TERM end it.
beside() {
  "$@" &
  step=$! direct=yes
}

# ask COMMAND...: run it on the first node; what it prints is $answer. A warning ends a question that has no answer yet.
ask() {
  local file
  file=$(mktemp) || exit 1
  beside "${on_head[@]}" "$@" >"$file"
  await
  # shellcheck disable=SC2034  # the scripts read it
  answer=$(<"$file")
  rm -f "$file"
}

# await: until the processes have ended; $code is the launcher's, which says little (srun may report a victim's).
await() {
  while :; do
    { wait "$step"; } 2>/dev/null                              # or bash quotes a command that was killed
    # shellcheck disable=SC2034  # the scripts read it
    code=$?
    kill -0 "$step" 2>/dev/null || break                       # a trap ends `wait` early
  done
  step=''
}

# tell SIGNAL: to every process. Where no controller passes a warning on, srun does by itself; not at once, as an srun that
# is just starting would die of it.
tell() {
  local patience=20
  [ "$1" != "$warning" ] || patience=10                        # which is told again, and by srun
  if [ "$direct" = yes ] && [ "$1" = USR1 ]; then kill -s TERM "$step"
  elif [ "$direct" = yes ] || [ "$LAUNCHER" = mpirun ]; then kill -s "$1" "$step"
  else timeout $patience scancel --signal="$1" "$job" || { [ "$1" = "$warning" ] && kill -s "$1" "$step"; }
  fi 2>/dev/null
}

# job_field NAME: what Slurm knows of this job, empty if the controller does not answer.
job_field() {
  timeout 20 scontrol show job -o "$job" 2>/dev/null | grep -o " $1=[^ ]*" | head -n 1 | cut -d= -f2
}

# A warning goes on to the processes, again and again: one that is just starting ignores it. Those that have not ended
# when there is just time left to requeue are hung, or too slow: they show where, and are ended. The end of a
# job moves when it is preempted, so it is asked for each time.
relay() {
  trap '' TERM                                                 # which Slurm sends to all of the job, this included
  local start=$SECONDS until=$((SECONDS + STOP_SECONDS)) end left
  tell "$warning"
  while kill -0 "$step" 2>/dev/null; do
    end=$(job_field EndTime)
    if [ -n "$end" ] && end=$(date -d "$end" +%s 2>/dev/null); then
      left=$((end - $(date +%s)))
      left=$((left > 2 * LEAVE ? left - LEAVE : left / 2))
      [ $((SECONDS + left)) -ge $until ] || until=$((SECONDS + left))
    fi
    left=$((until - SECONDS))
    [ $left -gt 0 ] || break
    ! gone $((left < 5 ? left : 5)) || return
    [ "$direct" = yes ] || tell "$warning"
  done
  ! gone 0 || return                                           # they ended while Slurm was being asked
  end_hung $((SECONDS - start))
}

# end_hung SECONDS: SIGABRT makes Python write the stacks of its threads (task.sh), whatever it hangs in, and ends it.
# Meanwhile srun sleeps: at the first task that ends it would kill those that have not got the signal yet.
end_hung() {
  say "still running $1 s after they were asked to stop: their stacks go to their logs, then they are killed"
  if [ "$direct" = no ] && [ "$LAUNCHER" = srun ]; then
    kill -s STOP "$step"
    tell ABRT
    sleep 3
    kill -s CONT "$step"
  else
    tell ABRT
  fi
  gone 3 || tell KILL
  gone 4 || kill -s KILL "$step" 2>/dev/null
}
# gone SECONDS: whether the processes end by themselves by then.
gone() {
  local end=$((SECONDS + $1))
  while kill -0 "$step" 2>/dev/null; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.5
  done
}

# Slurm has sent TERM to the tasks, takes no further signals for them, and sends KILL after KillWait. At a time limit (the
# warning came too late, or was switched off) this job has to be back in the queue by then.
linger() {
  trap '' TERM
  local pause
  [ "$direct" = no ] || tell TERM
  [ "$(job_field Reason)" = TimeLimit ] || return
  pause=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
  gone $((${pause:-30} / 2)) || { say "the processes do not end: going on without them"; kill -s KILL "$step"; }
}

warned() {
  [ "$told" = 0 ] || return 0
  told=1
  say "asked to stop: telling the processes"
  if [ -n "$step" ]; then relay & fi
}
# TERM comes when Slurm itself ends the job (scancel, an administrator's requeue, a dead node), and tells the tasks, too.
# While the job counts as running, somebody has sent it to this script alone.
terminated() {
  [ "$ended_by_slurm" = 0 ] || return 0
  if [ "$(job_field JobState)" = RUNNING ]; then warned; return; fi
  ended_by_slurm=1
  say "Slurm ends this start"
  if [ -n "$step" ]; then linger & fi
}
trap warned USR1 INT HUP
trap terminated TERM
