# shellcheck shell=bash disable=SC2034,SC2153,SC2154
# The job's container, if it has one. Sourced by lib.sh, which sets the variables and uses these:
# container: what a process starts with; in_srun: options of srun instead; on_head: what a command starts with that runs
# once, on the first node.
container=() in_srun=() on_head=()
mounts=$root${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}

# image_file SUFFIX COMMAND...: $CONTAINER_IMAGE as a file of CONTAINER_CACHE, fetched by `COMMAND FILE IMAGE` if it is not
# there: once, where else each start of processes would fetch and unpack it on each node.
image_file() {
  local suffix=$1 file
  shift
  file=$(tr -c 'A-Za-z0-9.\n' _ <<<"${CONTAINER_IMAGE#*://}")
  file=$CONTAINER_CACHE/$file.$suffix
  mkdir -p "$CONTAINER_CACHE" || die "CONTAINER_CACHE=$CONTAINER_CACHE cannot be made: name a folder that all nodes see"
  (
    flock 9                                                    # other jobs may want it, too
    [ -e "$file" ] && exit
    say "fetching $CONTAINER_IMAGE to $file"
    "$@" "$file.part" "$CONTAINER_IMAGE" && mv "$file.part" "$file"
  ) 9>"$file.lock" || die "CONTAINER_IMAGE=$CONTAINER_IMAGE cannot be fetched, see above: name an image, or a file of one"
  CONTAINER_IMAGE=$file
}

case $CONTAINER in
  none) ;;
  apptainer)
    case $CONTAINER_IMAGE in *://*) image_file sif apptainer pull ;; esac
    container=(apptainer exec --nv --bind "$mounts" "$CONTAINER_IMAGE")
    on_head=("${container[@]}") ;;
  # On srun, not on sbatch: the script itself has to call Slurm's commands, which containers lack.
  pyxis)
    case $CONTAINER_IMAGE in
      /* | ./*) ;;
      *://*) image_file sqsh enroot import --output ;;
      *) CONTAINER_IMAGE=docker://$CONTAINER_IMAGE; image_file sqsh enroot import --output ;;
    esac
    in_srun=("--container-image=$CONTAINER_IMAGE" --no-container-mount-home
             "--container-mounts=$root:$mounts" "--container-workdir=$root")
    on_head=(srun --overlap -N1 -n1 -w "$head" "${in_srun[@]}") ;;
  *) die "CONTAINER=$CONTAINER is unknown: use none, apptainer or pyxis" ;;
esac
