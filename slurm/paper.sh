#!/usr/bin/env bash
# A published table beside ours as one chain of jobs: harvest → sets → trainings → evaluations → report. Run it on the login
# node, as `slurm/pipeline.sh paper`: it checks data and recipes, submits the jobs, and returns.
#   slurm/pipeline.sh paper [CONFIG.yaml] [WORD …]
#   slurm/pipeline.sh paper --partition=gpu train:--nodes=2 eval:--array=0-15%8 model=models/llava-1.5-7b-hf
# A WORD is an override of configs/paper/llava_1_5_7b.yaml (key=value), or an option for sbatch (--name=value); with
# harvest:, prepare:, train:, eval: or report: before it, an option is for the jobs of that kind alone.
# Links that need nothing of each other run side by side; `mirage paper --plan` shows them, with hours and disk. Submitted
# again, it does what is missing: every job goes on where it was stopped.
set -euo pipefail
home=${MIRAGE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export MIRAGE_HOME=$home

die() {
  echo "pipeline.sh: $*; nothing was submitted" >&2
  exit 2
}
python=${MIRAGE_PYTHON:-$home/.venv/bin/python}
[[ -x $python ]] || python=python3
# shellcheck source=slurm/container.sh
source "$home/slurm/container.sh"
contain "$home"
if ((${#within[@]})); then
  python=${MIRAGE_CONTAINER_PYTHON:-python3}
  export PYTHONNOUSERSITE=1
fi
mirage() {
  PYTHONSAFEPATH=1 PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH} "${within[@]}" "$python" -m mirage_dist.cli "$@" ||
    die "see the line above"
}

words=() recipe=configs/paper/llava_1_5_7b.yaml
# shellcheck disable=SC2034  # read through namerefs
options_harvest=() options_prepare=() options_train=() options_eval=() options_report=()
for word in "$@"; do
  case $word in
    harvest:--?* | prepare:--?* | train:--?* | eval:--?* | report:--?*)
      declare -n given=options_${word%%:*}
      given+=("${word#*:}")
      ;;
    --?*)
      for kind in harvest prepare train eval report; do
        declare -n all=options_$kind
        all+=("$word")
      done
      ;;
    *=*) words+=("$word") ;;
    *.yaml) recipe=$word ;;
    *) die "$word: expected key=value, CONFIG.yaml or --option=value" ;;
  esac
done

mirage paper --check "$recipe" "${words[@]}"
table=$(mirage paper --links "$recipe" "${words[@]}")

declare -A id=()
ids=() held=()
while IFS=$'\t' read -r name needs script folder arguments; do
  case $name in
    harvest | report) kind=$name ;;
    data | set-*) kind=prepare ;;
    train-*) kind=train ;;
    *) kind='eval' ;;
  esac
  declare -n own=options_$kind
  after=()
  if [[ $needs != - ]]; then
    # A killed worker of an evaluation does not end the chain: the others take over its questions, and what comes after
    # refuses answers that are not complete.
    how=afterok
    [[ $kind != @(prepare|report) ]] || how=afterany
    IFS=, read -ra before <<<"$needs"
    list=
    for need in "${before[@]}"; do list+=:${id[$need]}; done
    after=("--dependency=$how$list" --kill-on-invalid-dep=yes)
  else
    after=(--hold)
  fi
  # Quoted by `mirage paper --links` for a shell.
  declare -a list_of="($arguments)"
  mkdir -p "$folder"
  if ! job=$(sbatch --parsable --chdir="$folder" --job-name="$name" "${own[@]}" "${after[@]}" "$home/slurm/$script" "${list_of[@]}"); then
    if ((${#ids[@]})); then scancel "${ids[@]}"; fi
    echo "pipeline.sh: sbatch refused the link $name; those before it are cancelled" >&2
    exit 1
  fi
  id[$name]=${job%%;*}
  ids+=("${id[$name]}")
  [[ $needs != - ]] || held+=("${id[$name]}")
  printf '%-32s %s\n' "$name" "${id[$name]}"
done <<<"$table"
scontrol release "$(IFS=, && echo "${held[*]}")"

echo "watch   squeue --jobs=$(IFS=, && echo "${ids[*]}")"
echo "cancel  scancel ${ids[*]}"
echo "result  report/index.html in the chain's \`out\`; mirage paper --report prints its first table"
