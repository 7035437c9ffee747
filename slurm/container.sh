# shellcheck shell=bash
# Sourced by the scripts here. MIRAGE_CONTAINER names an image that `mirage` runs in (docs/containers.md):
#   a file *.sif, or a directory that an image was unpacked to: by `apptainer exec`
#   a file *.sqsh, or an image of a registry such as registry.example.org#lab/mirage:0.2.0: by pyxis, an extension of srun
# It sees the working directory, this checkout, /tmp, TMPDIR, HF_HOME, MIRAGE_CACHE and the home directory under their own
# names; those of variables are made where they are missing, as on bare nodes.
#   MIRAGE_BINDS=/data,/scratch           further directories: of data and models, and of run.dir outside the working directory
#   MIRAGE_CONTAINER_PYTHON=python3       the image's Python that has mirage_dist
# Sets `within`, the words before a command, and `of_srun`, options of srun; both are empty without MIRAGE_CONTAINER.
# shellcheck disable=SC2034  # of the scripts that source this
within=() of_srun=()

# refuse TEXT: what is wrong with the variables above; ends the script.
refuse() {
  echo "MIRAGE_CONTAINER=$MIRAGE_CONTAINER: $*" >&2
  exit 2
}

# directories FOLDER …: what the image is to see, one a line, without those that lie in another.
directories() {
  local wanted=(/tmp) kept=() more one other
  IFS=, read -ra more <<<"${MIRAGE_BINDS:-}"
  for one in "$@" "${more[@]}"; do
    [[ ! $one ]] || wanted+=("${one%/}")
  done
  for one in "${wanted[@]}"; do
    [[ $one == /* ]] || refuse "$one: expected an absolute path (MIRAGE_BINDS, HF_HOME, MIRAGE_CACHE, TMPDIR)"
    [[ $one != *[,:]* ]] || refuse "$one: a path with a comma or a colon cannot be bound; work in another directory"
    for other in "${wanted[@]}"; do
      [[ $one != "$other"/* ]] || continue 2
    done
    [[ " ${kept[*]} " == *" $one "* ]] || kept+=("$one")
  done
  printf '%s\n' "${kept[@]}"
}

# shellcheck disable=SC2034
# contain HOME: HOME is the checkout, or what `mirage init` made.
contain() {
  local seen one runtime=pyxis mounts=() scratch=() shared=()
  [[ ${MIRAGE_CONTAINER:-} ]] || return 0
  if [[ -e $MIRAGE_CONTAINER ]]; then
    # The jobs of a chain run in other folders, and pyxis takes a name for a file's by how it begins. No realpath: the
    # image that a link names may have another suffix.
    [[ $MIRAGE_CONTAINER == /* ]] || export MIRAGE_CONTAINER=$PWD/$MIRAGE_CONTAINER
    [[ $MIRAGE_CONTAINER == *.sqsh ]] || runtime=apptainer
  elif [[ $MIRAGE_CONTAINER == @(*.sif|*.sqsh|/*|./*|../*) ]]; then
    refuse "no such image; docs/containers.md says how to build one"
  fi
  # A directory that does not exist cannot be mounted. Scratch is made on each node, for which pyxis leaves no time: what
  # is missing here is then the container's own.
  for one in "${TMPDIR:-}" "${SLURM_TMPDIR:-}"; do
    [[ ! $one || ($runtime == pyxis && $one == /* && ! -d $one) ]] || scratch+=("$one")
  done
  for one in "${HF_HOME:-}" "${MIRAGE_CACHE:-}"; do
    [[ ! $one ]] || shared+=("$one")
  done
  seen=$(directories "$1" "$PWD" "${scratch[@]}" "${shared[@]}") || exit
  while IFS= read -r seen; do mounts+=("$seen:$seen"); done <<<"$seen"
  if [[ $runtime == apptainer ]]; then
    command -v apptainer >/dev/null || refuse "apptainer is not on PATH; load its module before you submit"
    # --nv: the driver's libraries come from the host.
    within=(apptainer exec --nv --pwd "$PWD" --bind "$(IFS=, && echo "${mounts[*]}")" "$MIRAGE_CONTAINER")
    # Also shared ones, which may be a node's own. 102: bad input, as launch/node.sh says it.
    scratch+=("${shared[@]}")
    if ((${#scratch[@]})); then
      # shellcheck disable=SC2016  # expanded on the node
      within=(bash -c 'mkdir -p -- "${@:2:$1}" || exit 102; shift "$(($1 + 1))"; exec "$@"' bash
        "${#scratch[@]}" "${scratch[@]}" "${within[@]}")
    fi
  else
    [[ $(srun --help 2>&1) == *--container-image* ]] ||
      refuse "srun has no --container-image, so pyxis is not installed here; name an image file of Apptainer (….sif)"
    of_srun=("--container-image=$MIRAGE_CONTAINER" "--container-mounts=$(IFS=, && echo "${mounts[*]}")"
      "--container-workdir=$PWD" --container-mount-home)
  fi
  for one in "${shared[@]}"; do
    mkdir -p -- "$one" || refuse "$one: cannot be made; name directories that you can write to (HF_HOME, MIRAGE_CACHE)"
  done
}
