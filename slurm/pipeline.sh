#!/usr/bin/env bash
# The whole story as a chain of jobs: harvest → prepare → train → eval → report. Run it on the login node: it checks
# every recipe, submits the jobs, and returns. Each job starts when the one before has succeeded; prepare and report start
# whatever became of single workers, and refuse answers that are not complete.
#   slurm/pipeline.sh sft|npo|rmu [WORD …]
#   slurm/pipeline.sh paper [WORD …]    # a whole published table: see slurm/paper.sh
#   slurm/pipeline.sh npo --partition=gpu model.path=models/llava-1.5-7b-hf run.dir=runs/npo-2 train:--nodes=2 \
#     train.micro_batch=1 eval:--array=0-15%8 report:runs/llava-base
# A WORD is an override (key=value), a recipe (FILE.yaml) or an option for sbatch (--name=value). With harvest:, prepare:,
# train:, eval: or report: before it, it is for that link; report: also takes other runs, to be compared with this one.
# Without: options are for every link; run.dir is the run that train writes, eval evaluates and report reports; model.path
# is for harvest and train; seed and world.… for all that read a recipe; other overrides and a recipe for train.
# The links prepare and harvest exist where they are needed: for sft, when a word is for them; harvest, when prepare's
# recipe takes harvested answers and no prepare:harvest=… says where they are. skip:prepare leaves both out, skip:harvest
# that one: their files exist.
# Change first: the partition and account, --nodes and --gres of train, and what the recipes say about model and data.
set -euo pipefail
home=${MIRAGE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export MIRAGE_HOME=$home

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}
die() {
  echo "pipeline.sh: $*; nothing was submitted" >&2
  exit 2
}

# The command `mirage` of this checkout. It prints what is wrong with a recipe itself.
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

links=(harvest prepare train eval report)
declare -A skip=() wanted=() recipe=([harvest]=configs/eval/harvest.yaml [prepare]=configs/prepare/vlguard.yaml
  [eval]=configs/eval/vlguard.yaml)
case ${1:-} in
  sft) script=sft.sh recipe[train]=configs/train/sft.yaml ;;
  npo | rmu) script=unlearn_$1.sh recipe[train]=configs/train/$1.yaml wanted[prepare]=yes ;;
  paper) exec "$home/slurm/paper.sh" "${@:2}" ;;
  *) usage ;;
esac
shift
run_word=() # run.dir=…, if it was given
# shellcheck disable=SC2034  # read and extended through namerefs
sbatch_harvest=() sbatch_prepare=() sbatch_train=() sbatch_eval=() sbatch_report=()
# shellcheck disable=SC2034
words_harvest=() words_prepare=() words_train=() words_eval=() words_report=()

# give WORD LINK …: add it to what sbatch, the recipe or the overrides of these links are.
give() {
  local word=$1 link
  shift
  for link in "$@"; do
    if [[ $word == --?* ]]; then
      declare -n given=sbatch_$link && given+=("$word")
    elif [[ $link == report && $word ]]; then
      words_report+=("$word")
    elif [[ $link == @(train|eval) && $word == run.dir=* ]]; then
      run_word=("$word")
    elif [[ $word == *=* ]]; then
      declare -n overrides=words_$link && overrides+=("$word")
    elif [[ $word == *.yaml ]]; then
      recipe[$link]=$word
    else
      die "$word: expected key=value, FILE.yaml or --option=value"
    fi
  done
}

for word in "$@"; do
  case $word in
    skip:prepare | skip:harvest) skip[${word#skip:}]=yes ;;
    skip:*) die "$word: only prepare and harvest can be left out" ;;
    harvest:* | prepare:*) give "${word#*:}" "${word%%:*}" && wanted[prepare]=yes wanted[${word%%:*}]=yes ;;
    train:* | eval:* | report:*) give "${word#*:}" "${word%%:*}" ;;
    --*) give "$word" "${links[@]}" ;;
    seed=* | world=* | world.*=*) give "$word" harvest prepare train eval ;;
    model.path=*) give "$word" harvest train ;;
    *) give "$word" train ;;
  esac
done

# What the recipes say, one value a line. A value that goes into another recipe is quoted as `mirage` quotes it.
lines=$(mirage config "${recipe[train]}" "${words_train[@]}" "${run_word[@]}" --get run.dir --get data.system_prompt \
  --get data.template_options --get data.image_aspect --override run.dir --override model.path --override data.streams)
mapfile -t of_train <<<"$lines"
run_dir=${of_train[0]} run_word=("${of_train[4]}")
words_train+=("${run_word[@]}")
words_eval+=("${run_word[@]}")
lines=$(mirage config "${recipe[eval]}" "${words_eval[@]}" --get suite --get template.system_prompt \
  --get template.template_options --get template.image_aspect --get template.defence)
mapfile -t of_eval <<<"$lines"
suite=${of_eval[0]}

if [[ ${wanted[prepare]:-} && ! ${skip[prepare]:-} ]]; then
  lines=$(mirage config "${recipe[prepare]}" "${words_prepare[@]}" --get answers --override out)
  mapfile -t of_prepare <<<"$lines"
  out=${of_prepare[1]#out=\"}
  [[ ${of_train[6]} == *"\"path\": \"${out%\"}/"* ]] ||
    die "train reads no set that prepare writes to ${of_prepare[1]#out=}: change prepare:out=… or train's data.streams"
  if [[ ${of_prepare[0]} == harvest && ! ${skip[harvest]:-} && " ${words_prepare[*]}" != *" harvest="* ]]; then
    wanted[harvest]=yes
    # The answers of the model that training begins with, unless another recipe says whose.
    if [[ ${recipe[harvest]} == configs/eval/harvest.yaml ]]; then
      words_harvest=("${of_train[5]}" "${words_harvest[@]}")
    fi
    lines=$(mirage config "${recipe[harvest]}" "${words_harvest[@]}" --override run.dir --override suite)
    mapfile -t of_harvest <<<"$lines"
    from=${of_harvest[0]#run.dir=\"} of=${of_harvest[1]#suite=\"}
    words_prepare+=("harvest=\"${from%\"}/evals/${of%\"}/rows\"")
  elif [[ ${wanted[harvest]:-} ]]; then
    die "words for harvest, but prepare reads no answers that it would make"
  fi
else
  wanted=()
fi

# The number of processes of train, by the script's #SBATCH lines and the words, of which the last counts.
processes() {
  local option nodes=1 tasks='' each=1 gpus=1 list
  while IFS= read -r option; do
    case $option in
      --nodes[=\ ]* | -N\ *) nodes=${option#*[= ]} ;;
      --ntasks[=\ ]* | -n\ *) tasks=${option#*[= ]} ;;
      --ntasks-per-node[=\ ]*) each=${option#*[= ]} ;;
      --gres[=\ ]gpu* | --gpus-per-node[=\ ]*) gpus=${option##*[=: ]} ;;
    esac
  done < <(sed -n 's/^#SBATCH  *//p' "$home/slurm/$script" && printf '%s\n' "${sbatch_train[@]}")
  case ${MIRAGE_LAUNCHER:-srun} in
    torchrun | deepspeed)
      IFS=, read -ra list <<<"${MIRAGE_GPUS:-}"
      echo "$((${nodes%%-*} * (${#list[@]} ? ${#list[@]} : gpus)))"
      ;;
    *) echo "${tasks:-$((${nodes%%-*} * each))}" ;;
  esac
}

# Every recipe is checked before the first job is submitted: an error in the last one would show after days.
for key in 1 2 3; do
  if [[ ${of_train[key]} != "${of_eval[key]}" && ! (${of_train[key]} == auto || ${of_eval[key]} == auto) &&
    ! ($key == 1 && ${of_eval[4]} != null) ]]; then
    names=(. system_prompt template_options image_aspect)
    die "train has data.${names[key]}=${of_train[key]} and eval template.${names[key]}=${of_eval[key]}; make them equal" \
      "(a system prompt that is to defend the model has a name: eval:template.defence=NAME)"
  fi
done
if [[ ${wanted[harvest]:-} ]]; then mirage eval "${recipe[harvest]}" "${words_harvest[@]}" --check; fi
if [[ ${wanted[prepare]:-} ]]; then mirage prepare "${recipe[prepare]}" "${words_prepare[@]}" --check; fi
mirage train "${recipe[train]}" "${words_train[@]}" --check-recipe --ranks "$(processes)"
mirage eval "${recipe[eval]}" "${words_eval[@]}" --check

declare -A id=()
ids=()
# submit LINK DEPENDENCY ARGUMENTS: held until the whole chain is there, so that nothing starts when a later link is
# refused.
submit() {
  local link=$1 after=()
  declare -n options=sbatch_$link
  # Without the second option the rest of the chain would wait for ever when a link fails.
  if [[ $2 ]]; then after=("--dependency=$2" --kill-on-invalid-dep=yes); else after=(--hold); fi
  shift 2
  if ! id[$link]=$(sbatch --parsable --job-name="$link" "${options[@]}" "${after[@]}" "$@"); then
    if ((${#ids[@]})); then scancel "${ids[@]}"; fi
    echo "pipeline.sh: sbatch refused the link $link; those before it are cancelled" >&2
    exit 1
  fi
  id[$link]=${id[$link]%%;*}
  ids+=("${id[$link]}")
  printf '%-8s %s\n' "$link" "${id[$link]}"
}

# A killed worker of an evaluation does not end the chain: the others take over its questions.
if [[ ${wanted[harvest]:-} ]]; then
  submit harvest "" "$home/slurm/eval_attacks.sh" "${recipe[harvest]}" "${words_harvest[@]}"
fi
if [[ ${wanted[prepare]:-} ]]; then
  submit prepare "${id[harvest]:+afterany:${id[harvest]}}" "$home/slurm/mirage.sh" prepare "${recipe[prepare]}" \
    "${words_prepare[@]}"
fi
submit train "${id[prepare]:+afterok:${id[prepare]}}" "$home/slurm/$script" "${recipe[train]}" "${words_train[@]}"
submit eval "afterok:${id[train]}" "$home/slurm/eval_attacks.sh" "${recipe[eval]}" "${words_eval[@]}"
submit report "afterok:${id[train]},afterany:${id[eval]}" "$home/slurm/mirage.sh" report "$run_dir" \
  "${words_report[@]}" --suite "$suite"
scontrol release "${ids[0]}"

echo "watch   squeue --jobs=$(IFS=, && echo "${ids[*]}")"
echo "logs    in this folder, one a job: LINK-ID.log, and eval-ID_WORKER.log"
echo "cancel  scancel ${ids[*]}"
echo "result  $run_dir/report/index.html"
