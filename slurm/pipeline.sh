#!/usr/bin/env bash
# The whole story as a chain of jobs, each started when the one before has succeeded: prepare → train → eval → report.
# Run it on the login node; it submits and returns.
#   slurm/pipeline.sh sft|npo|rmu [WORD …]
#   slurm/pipeline.sh npo --partition=gpu train:--nodes=4 train.lr=5e-7 run.dir=runs/npo-4 eval:--array=0-15%8
# A WORD is an override (key=value), a recipe (FILE.yaml) or an option for sbatch (--name=value). With prepare:, train:,
# eval: or report: before it, it is for that link. Without: options are for every link; run.dir for train, eval and
# report; seed and world.… for all that read a recipe; other overrides and a recipe for train.
# skip:prepare leaves that link out: the forget and retain sets are there (the default for sft, which needs none).
# Change first: the partition and account, --nodes and --gres of train, and what the recipes say about model and data.
set -euo pipefail
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export MIRAGE_HOME=${MIRAGE_HOME:-$home}

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}
die() {
  echo "pipeline.sh: $*" >&2
  exit 2
}

links=(prepare train eval report)
skip=
case ${1:-} in
  sft) script=sft.sh recipe_train=configs/train/sft.yaml skip=prepare ;;
  npo | rmu) script=unlearn_$1.sh recipe_train=configs/train/$1.yaml ;;
  *) usage ;;
esac
shift
recipe_prepare=configs/prepare/vlguard.yaml recipe_eval=configs/eval/vlguard.yaml
run_dir=
# shellcheck disable=SC2034  # read and extended through namerefs
sbatch_prepare=() sbatch_train=() sbatch_eval=() sbatch_report=()
words_prepare=() words_train=() words_eval=() words_report=()

# give WORD LINK …: add it to what sbatch, the recipe or the overrides of these links are.
give() {
  local word=$1 link
  shift
  for link in "$@"; do
    case $word in
      --?*) declare -n given=sbatch_$link && given+=("$word") ;;
      run.dir=*) run_dir=${word#run.dir=} ;;
      *=*) declare -n overrides=words_$link && overrides+=("$word") ;;
      *.yaml) printf -v "recipe_$link" %s "$word" ;;
      *) die "$word: expected key=value, FILE.yaml or --option=value" ;;
    esac
  done
}

for word in "$@"; do
  case $word in
    skip:prepare) skip=prepare ;;
    prepare:* | train:* | eval:* | report:*) give "${word#*:}" "${word%%:*}" ;;
    --*) give "$word" "${links[@]}" ;;
    seed=* | world=* | world.*=*) give "$word" prepare train eval ;;
    *) give "$word" train ;;
  esac
done

# A path as given, or relative to the repository.
find_recipe() {
  local file
  for file in "$1" "$home/$1"; do
    if [[ -f $file ]]; then echo "$file" && return; fi
  done
  die "$1: no such file"
}
recipe_prepare=$(find_recipe "$recipe_prepare")
recipe_train=$(find_recipe "$recipe_train")
recipe_eval=$(find_recipe "$recipe_eval")
if [[ -z $run_dir ]]; then
  run_dir=$(sed -n '/^run:/,/^[^ #]/s/^ *dir: *\([^ #]*\).*/\1/p' "$recipe_train")
  [[ $run_dir && $run_dir != *'$'* ]] || die "say where the run goes: run.dir=DIR"
fi

ids=()
# submit LINK ARGUMENTS: held until the whole chain is there, so that nothing starts when a later link is refused.
submit() {
  local link=$1 after=() id
  shift
  declare -n options=sbatch_$link
  if ((${#ids[@]})); then
    # Without the second option the rest of the chain would wait for ever when a link fails.
    after=("--dependency=afterok:${ids[-1]}" --kill-on-invalid-dep=yes)
  else
    after=(--hold)
  fi
  if ! id=$(sbatch --parsable --job-name="$link" "${options[@]}" "${after[@]}" "$@"); then
    if ((${#ids[@]})); then scancel "${ids[@]}"; fi
    echo "pipeline.sh: sbatch refused the link $link; those before it are cancelled" >&2
    exit 1
  fi
  id=${id%%;*}
  ids+=("$id")
  printf '%-8s %s\n' "$link" "$id"
}

if [[ $skip != prepare ]]; then
  submit prepare "$home/slurm/mirage.sh" prepare "$recipe_prepare" "${words_prepare[@]}"
fi
submit train "$home/slurm/$script" "$recipe_train" "run.dir=$run_dir" "${words_train[@]}"
submit eval "$home/slurm/eval_attacks.sh" "$recipe_eval" "run.dir=$run_dir" "${words_eval[@]}"
submit report "$home/slurm/mirage.sh" report "$run_dir" "${words_report[@]}"
scontrol release "${ids[0]}"

echo "watch   squeue --jobs=$(IFS=, && echo "${ids[*]}")"
echo "logs    in this folder, one a job: LINK-ID.log, and eval-ID_WORKER.log"
echo "cancel  scancel ${ids[*]}"
echo "result  $run_dir/report/index.html"
