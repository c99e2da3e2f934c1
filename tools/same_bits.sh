#!/usr/bin/env bash
# Runs two commits of this repository on this machine and compares, to the last bit, what comes of them.
#
#   tools/same_bits.sh OLD NEW [--only PART]... [--short] [--keep]
#
# OLD, NEW     commits: a hash, a branch, a tag, HEAD
# --only PART  this part alone; may be given several times:
#                quickstart      `tulu-mega quickstart`, seed 0: evaluation, sft TP2, rm DP2, dpo DP2, grpo DP2 with one server
#                sft_tp2_pp2     sft, 5 steps, several packs a step
#                dpo_cp2         dpo, 5 steps, reference log-probabilities under the same layout
#                grpo_pp2        grpo, 5 steps of two updates each, two servers, a reference model, held-out prompts
# --short      the quickstart with few steps; so it is, too, where --only leaves it out, for the other parts train its models
# --keep       leave the directories even where all is equal
#
# Each commit's files are unpacked in a directory of their own, with an environment of their own over the project's .venv, so that
# the command and vLLM's plug-in are that commit's. Only the command line is used: modules may have other names in either. The two
# sides take turns, with one thread a process and relative paths, which are the same on both. tools/same_bits.py compares and says
# what it leaves out. Needs `make venv` and two cores that have nothing else to do.
#
# Exit status: 0 all equal, 1 something differs, 2 a wrong argument or a command that failed; the directories are then kept.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$repository/.venv/bin/python
all=(quickstart sft_tp2_pp2 dpo_cp2 grpo_pp2)

usage() { sed -n '/^# /!{/^#$/!q};s/^# \{0,1\}//p' <(tail -n +2 "${BASH_SOURCE[0]}"); }
wrong() { echo "error: $*" >&2; exit 2; }

commits=() asked=() parts=() short='' keep=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --only)
      [[ " ${all[*]} " == *" ${2:-} "* && -n ${2:-} ]] || wrong "--only ${2:-}: expected one of ${all[*]}"
      asked+=("$2"); shift 2 ;;
    --short) short=1; shift ;;
    --keep) keep=1; shift ;;
    -*) wrong "$1: no such option; --help lists them" ;;
    *) commits+=("$1"); shift ;;
  esac
done
[ ${#commits[@]} -eq 2 ] || wrong "expected two commits, got ${#commits[@]}; tools/same_bits.sh --help"
[ -x "$python" ] || wrong "$python is missing; make venv builds it"
[ ${#asked[@]} -gt 0 ] || asked=("${all[@]}")
[[ " ${asked[*]} " == *" quickstart "* ]] || short=1 asked+=(quickstart)
for part in "${all[@]}"; do [[ " ${asked[*]} " != *" $part "* ]] || parts+=("$part"); done
for at in 0 1; do
  found=$(git -C "$repository" rev-parse --verify --quiet "${commits[at]}^{commit}") || wrong "${commits[at]}: no such commit"
  names[at]=${commits[at]}
  commits[at]=$found
done

work=$(mktemp -d "${TMPDIR:-/tmp}/same_bits.XXXXXX")
finish() {
  local status=$?
  [ "$status" -ne 0 ] || [ -n "$keep" ] || { rm -rf "$work"; return; }
  echo "kept: $work (old/ and new/, each with code/ env/ runs/ logs/)"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# unpacked SIDE COMMIT: the commit's files and an environment over the project's in which they are what is installed
unpacked() {
  local place=$work/$1 site
  mkdir -p "$place/code" "$place/runs" "$place/logs"
  git -C "$repository" archive "$2" | tar -x -C "$place/code"
  cmp -s "$place/code/requirements/cpu.txt" "$repository/.venv/.locked" ||
    echo "warning: $1: its requirements/cpu.txt is not what .venv was built from; both sides run with .venv's packages" >&2
  "$python" -m venv --without-pip "$place/env"
  site=$("$place/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys; print(*[path for path in sys.path if path.endswith("site-packages")], sep="\n")' > "$site/base.pth"
  (cd "$place/code" && "$place/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
    --root-user-action ignore --no-deps --no-build-isolation --ignore-installed --prefix "$place/env" -e .) \
    > "$place/logs/install.log" 2>&1 ||
    { cat "$place/logs/install.log" >&2; wrong "$1: could not be installed"; }
  "$place/env/bin/python" "$repository/tools/same_bits.py" installed "$place/code" ||
    wrong "$1: another tulu_mega than its own is installed in $place/env"
}

# on SIDE NAME COMMAND...: in the side's directory of runs, what is said into logs/NAME.log
on() {
  local side=$1 name=$2
  shift 2
  (cd "$work/$side/runs" && exec env -u PYTHONPATH OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
    WANDB_MODE=disabled "$@") > "$work/$side/logs/$name.log" 2>&1 && return
  tail -n 20 "$work/$side/logs/$name.log" >&2
  wrong "$side: $name failed; see above and $work/$side/logs/$name.log"
}

# train SIDE NAME STAGE FLAG...: a stage with the quickstart's settings and others, into the run directory NAME
train() {
  local side=$1 name=$2 stage=$3
  shift 3
  on "$side" "$name" "$work/$side/env/bin/python" -m tulu_mega "$stage" "quickstart/$stage.toml" \
    --run_dir "$name" --train.steps 5 "$@"
}

# one SIDE PART
one() {
  local side=$1 part=$2 runs=$work/$1/runs few=()
  case $part in
    quickstart)
      [ -z "$short" ] || few=(--steps 60 --rm_steps 5 --dpo_steps 5 --grpo_steps 4)
      on "$side" "$part" "$work/$side/env/bin/tulu-mega" quickstart --run_dir quickstart --seed 0 "${few[@]}"
      mkdir -p "$runs/few"
      for file in train pairs heldout_pairs prompts heldout; do
        head -n 400 "$runs/quickstart/data/$file.jsonl" > "$runs/few/$file.jsonl"
      done ;;
    sft_tp2_pp2)
      train "$side" "$part" sft --data.train few/train.jsonl --data.pack_length 1024 --parallel.tensor 2 --parallel.pipeline 2 ;;
    dpo_cp2)
      train "$side" "$part" dpo --data.train few/pairs.jsonl --heldout.data few/heldout_pairs.jsonl --heldout.every 3 \
        --parallel.data 1 --parallel.context 2 ;;
    grpo_pp2)
      train "$side" "$part" grpo --data.train few/prompts.jsonl --heldout.data few/heldout.jsonl --heldout.every 3 \
        --policy.beta 0.05 --train.mini_batches 2 --parallel.data 1 --parallel.pipeline 2 --rollout.servers 2 ;;
  esac
}

# compare RUN...: a line for each thing that came of a run
compare() { "$python" "$repository/tools/same_bits.py" compare "$work/old/runs" "$work/new/runs" "$@" || different=1; }

different=''
[ -z "$short" ] || echo "a short quickstart"
echo "old: ${names[0]} (${commits[0]:0:10})   new: ${names[1]} (${commits[1]:0:10})   in $work"
unpacked old "${commits[0]}"
unpacked new "${commits[1]}"
for part in "${parts[@]}"; do
  for side in old new; do
    began=$SECONDS
    printf '== %s, %s: ' "$part" "$side"
    one "$side" "$part"
    echo "$((SECONDS - began)) s"
  done
  case $part in
    quickstart) compare quickstart quickstart/sft quickstart/rm quickstart/dpo quickstart/grpo ;;
    *) compare "$part" ;;
  esac
done
[ -z "$different" ] || { echo "different: see above"; exit 1; }
echo "equal to the last bit: ${parts[*]}, $SECONDS s"
