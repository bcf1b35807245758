#!/usr/bin/env bash
# Submit all steps as a chain of Slurm jobs, each of which starts when the jobs it depends on have succeeded:
#
#   launch/slurm/submit.sh --run DIR [CONTAINER] [SBATCH…] @STEP [SBATCH…] [-- ARGUMENTS…] @STEP …
#
# --run DIR   the folder for data, checkpoints and logs (required)
# CONTAINER   --container-image IMAGE or --apptainer IMAGE, and --container-mounts FROM:TO
# SBATCH      options of sbatch (--partition, --account, --time, --nodes, …), for all steps or for one
# ARGUMENTS   go to the step's tool; this script adds the paths in DIR
#
# The steps, in this order:
#   @expanded, @replay   corpora of stage 1 and stage 2 (data_tools/preprocess_data.py); with --shards N before the --,
#                        an array of N jobs and a job that merges their outputs (default: one job)
#   @convert             upcycling (checkpoint_convert/hf_to_mcore.py)
#   @stage0              training of new tokens, if @convert has an --extended-tokenizer; @stage1 then starts from it
#   @stage1, @stage2     training
#   @export, @evaluate   a Hugging Face model (DIR/hf), and its bits per byte (DIR/evaluation/)
# Prints the job IDs. Rerun the same command to resume a broken chain: it submits the steps that are neither done nor
# pending nor running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ ${1:-} =~ ^(-h|--help)$ ]]; then exec sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' launch/slurm/submit.sh; fi

fail() {
    echo "submit.sh: error: $1" >&2
    exit 2
}

declare -A job=() # step → its last job, for steps that are not done

is_done() {
    case $1 in
    expanded | replay) [[ -e $run/data/$1_text_document.idx ]] ;;
    convert) [[ -e $run/upcycled/latest_checkpointed_iteration.txt ]] ;;
    stage0 | stage1 | stage2) [[ -e $run/$1/FINISHED ]] ;;
    export) [[ -e $run/hf/config.json ]] ;;
    evaluate) [[ -e $run/evaluation/results.json ]] ;;
    *) fail "unknown step @$1; the steps are @expanded, @replay, @convert, @stage0, @stage1, @stage2, @export, @evaluate" ;;
    esac
}

# Print the job of step $1 that an earlier call has submitted, if it is pending or running.
active_job() {
    local id
    id=$(cat "$run/slurm/$1.job" 2>/dev/null) || return 1
    [[ -n $(squeue --noheader --jobs "$id" --name "$name-$1" --format %i 2>/dev/null) ]] && echo "$id"
}

# submit STEP NEEDS SBATCH…: submit a job, record it, and set job[STEP].
submit() {
    local step=$1 ids="" need
    for need in $2; do ids+=${job[$need]:+:${job[$need]}}; done
    job[$step]=$(sbatch --parsable --job-name "$name-$step" --output "$run/slurm/%x-%j.log" --kill-on-invalid-dep=yes \
        ${ids:+--dependency "afterok$ids"} "${common[@]}" "${@:3}")
    job[$step]=${job[$step]%%;*} # "id;cluster" on a federation
    echo "${job[$step]}" >"$run/slurm/$step.job"
    echo "$step: job ${job[$step]}${ids:+, after ${ids:1}}"
}

preprocess() {
    local step=$1 shards=$2 tool=(launch/slurm/tool.sbatch "${container[@]}") missing="" shard id
    local out=$run/data/$step flags=("${@:3}" --resume) # after the time limit too
    if [[ -z $shards ]]; then
        submit "$step" "" "${options[@]}" "${tool[@]}" data_tools/preprocess_data.py "${flags[@]}" --output-prefix "$out"
        return
    fi
    if id=$(active_job "$step-shards"); then
        fail "shards of an earlier call are still running; wait for them, or cancel them with scancel $id"
    fi
    for ((shard = 0; shard < shards; shard++)); do
        printf -v id "%s_text_document.shard-%05d-of-%05d.idx" "$out" "$shard" "$shards"
        [[ -e $id ]] || missing+=,$shard
    done
    if [[ -n $missing ]]; then
        submit "$step-shards" "" "${options[@]}" --array "${missing:1}" "${tool[@]}" data_tools/preprocess_data.py \
            "${flags[@]}" --output-prefix "$out" --num-shards "$shards"
    fi
    submit "$step" "$step-shards" "${options[@]}" "${tool[@]}" data_tools/merge_data.py \
        --output-prefix "${out}_text_document" --num-shards "$shards" --remove-input
}

# step STEP SBATCH… [-- ARGUMENTS…]: submit a step unless it is done.
step() {
    local step=$1 start=upcycled needs="" need id shards="" options=() flags=()
    shift
    if is_done "$step"; then
        echo "$step: done"
        return
    fi
    while [[ $# -gt 0 && $1 != -- ]]; do
        if [[ $1 == --shards ]]; then
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--shards must be a positive integer, got ${2:-nothing}"
            shards=$2
            shift
        else
            options+=("$1")
        fi
        shift
    done
    flags=("${@:2}")
    if id=$(active_job "$step"); then
        job[$step]=$id
        echo "$step: job $id is pending or running"
        return
    fi
    case $step in
    stage0) needs="convert expanded" ;;
    stage1)
        needs="convert expanded"
        if [[ -e $run/stage0 || -e $run/slurm/stage0.job ]]; then start=stage0 needs="stage0 expanded"; fi
        ;;
    stage2) needs="stage1 replay" ;;
    export) needs=stage2 ;;
    evaluate) needs="export" ;;
    esac
    for need in $needs; do
        if [[ -z ${job[$need]:-} ]] && ! is_done "$need"; then
            [[ $need =~ expanded|replay && " ${flags[*]} " == *" --data-path "* ]] ||
                fail "@$step requires @$need, which is neither done in $run nor given before it"
        fi
    done
    local tool=("${options[@]}" launch/slurm/tool.sbatch "${container[@]}")
    local stage=("${options[@]}" launch/slurm/stage.sbatch "${container[@]}" "$step" --save "$run/$step")
    case $step in
    expanded | replay) preprocess "$step" "$shards" "${flags[@]}" ;;
    convert) submit "$step" "" "${tool[@]}" checkpoint_convert/hf_to_mcore.py --save "$run/upcycled" "${flags[@]}" ;;
    stage0 | stage1)
        submit "$step" "$needs" "${stage[@]}" --pretrained-checkpoint "$run/$start" \
            --data-path "$run/data/expanded_text_document" "${flags[@]}"
        ;;
    stage2)
        submit "$step" "$needs" "${stage[@]}" --pretrained-checkpoint "$run/stage1" \
            --data-path "$run/data/replay_text_document" "${flags[@]}"
        ;;
    export)
        submit "$step" "$needs" "${tool[@]}" checkpoint_convert/mcore_to_hf.py --load "$run/stage2" \
            --save "$run/hf" "${flags[@]}"
        ;;
    evaluate)
        # Changes are relative to the first model, so those of the user come first.
        submit "$step" "$needs" "${tool[@]}" -m moelpr.evaluate --output "$run/evaluation" "${flags[@]}" \
            --model "stage2=$run/hf"
        ;;
    esac
}

run="" common=() container=()
while [[ $# -gt 0 && $1 != @* ]]; do
    case $1 in
    --run) run=${2:-} && shift 2 ;;
    --container-image | --apptainer | --container-mounts) container+=("$1" "${2:-}") && shift 2 ;;
    *) common+=("$1") && shift ;;
    esac
done
[[ -n $run ]] || fail "--run DIR is required: the folder for data, checkpoints and logs"
[[ $# -gt 0 ]] || fail "no step given; pass at least one, for example @convert -- --hf-path DIR --num-new-experts 5"
for word in "$@"; do
    if [[ $word == @* ]]; then is_done "${word#@}" || true; fi # an unknown step is an error
done
command -v sbatch >/dev/null || fail "sbatch is not installed; run this on a login node of the cluster"
mkdir -p "$run/slurm"
name=$(basename "$run")
while [[ $# -gt 0 ]]; do
    arguments=("${1#@}")
    shift
    while [[ $# -gt 0 && $1 != @* ]]; do arguments+=("$1") && shift; done
    step "${arguments[@]}"
done
