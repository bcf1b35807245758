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
# pending nor running. A step is done if its output is there, and neither the steps that it was made from were made again
# since, nor has its recipe changed. @export and @evaluate are then made again; for a training, an error names its folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ ${1:-} =~ ^(-h|--help)$ ]]; then exec sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' launch/slurm/submit.sh; fi

fail() {
    echo "submit.sh: error: $1" >&2
    exit 2
}

declare -A job=()           # step → its last job, for steps that are not done
declare -A active=()        # step → its job of an earlier call, if it is pending or running
declare -A is_made_again=() # steps that this call submits
declare -A recipe=()        # step → value of its --recipe

# Print a file that the complete output of step $1 has.
output_of() {
    case $1 in
    expanded | replay) echo "$run/data/$1_text_document.idx" ;;
    convert) echo "$run/upcycled/latest_checkpointed_iteration.txt" ;;
    stage0 | stage1 | stage2) echo "$run/$1/FINISHED" ;;
    export) echo "$run/hf/config.json" ;;
    evaluate) echo "$run/evaluation/results.json" ;;
    *) fail "unknown step @$1; the steps are @expanded, @replay, @convert, @stage0, @stage1, @stage2, @export, @evaluate" ;;
    esac
}

# Print the steps that step $1 reads.
needs_of() {
    case $1 in
    stage0) echo convert expanded ;;
    stage1) if has_stage0; then echo stage0 expanded; else echo convert expanded; fi ;;
    stage2) echo stage1 replay ;;
    export) echo stage2 ;;
    evaluate) echo export ;;
    esac
}

has_stage0() { [[ -n ${is_made_again[stage0]:-} || -e $run/stage0 || -e $run/slurm/stage0.job ]]; }

# Print what step $1 is made from, one a line: the last job of each step that it reads, and its recipe's checksum.
made_from() {
    local need
    for need in $(needs_of "$1"); do echo "$need $(cat "$run/slurm/$need.job" 2>/dev/null)"; done
    if [[ -f ${recipe[$1]:-} ]]; then echo "recipe $(sha256sum <"${recipe[$1]}" | cut -d " " -f 1)"; fi
}

# Print why what there is of step $1 is not what it would be now, if so. Only a finished training is bound to its recipe.
reason_to_redo() {
    local record=$run/slurm/$1.made_from source now before
    [[ -e $record ]] || return 0 # an earlier version of this script has submitted it, or no one
    while read -r source now; do
        before=$(sed -n "s/^$source //p" "$record")
        if [[ $source == recipe ]]; then
            if [[ -n $before && $before != "$now" && -e $(output_of "$1") ]]; then
                echo "its recipe has changed"
                return
            fi
        elif [[ -z $before && $source != stage0 ]]; then # it has another --data-path
            continue
        elif [[ -n ${is_made_again[$source]:-} ]]; then
            echo "$source is made again"
            return
        elif [[ $before != "$now" ]]; then
            echo "$source has been made again since, by job $now"
            return
        fi
    done < <(made_from "$1")
}

is_done() { [[ -e $(output_of "$1") && -z $(reason_to_redo "$1") ]]; }

# Read the arguments of all steps: check their names, and set recipe.
read_steps() {
    local step="" before="" word
    for word in "$@"; do
        if [[ $word == @* ]]; then
            step=${word#@}
            output_of "$step" >/dev/null
        elif [[ $before == --recipe ]]; then
            recipe[$step]=$word
        elif [[ $word == --recipe=* ]]; then
            recipe[$step]=${word#--recipe=}
        fi
        before=$word
    done
}

# Set active and is_made_again, before anything is submitted.
plan() {
    local step reason id
    for step in "$@"; do
        if [[ $step != @* ]] || is_done "${step#@}"; then continue; fi
        step=${step#@}
        reason=$(reason_to_redo "$step")
        if id=$(active_job "$step"); then
            active[$step]=$id
            [[ -z $reason ]] ||
                fail "job $id of @$step is pending or running, but $reason; cancel it (scancel $id) or wait for its end"
        elif [[ -n $reason && $step == stage? && -e $run/$step/latest_checkpointed_iteration.txt ]]; then
            fail "@$step is not what it would be now ($reason); remove $run/$step to make it again, or $run/slurm/$step.made_from to keep it"
        else
            is_made_again[$step]=yes
        fi
    done
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
    made_from "$step" >"$run/slurm/$step.made_from"
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
    local step=$1 needs need start data shards="" options=() flags=() reason
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
    if [[ -n ${active[$step]:-} ]]; then
        job[$step]=${active[$step]}
        echo "$step: job ${job[$step]} is pending or running"
        return
    fi
    needs=$(needs_of "$step")
    for need in $needs; do
        if [[ -z ${job[$need]:-} ]] && ! is_done "$need"; then
            reason=$(reason_to_redo "$need")
            [[ $need =~ expanded|replay && " ${flags[*]} " == *" --data-path "* ]] ||
                fail "@$step requires @$need, which is neither done in $run nor given before it${reason:+ ($reason)}"
        fi
    done
    reason=$(reason_to_redo "$step")
    if [[ -n $reason && -e $(output_of "$step") ]]; then
        echo "$step is not what it would be now ($reason)"
        if [[ $step == export ]]; then flags+=(--overwrite); fi
    fi
    local tool=("${options[@]}" launch/slurm/tool.sbatch "${container[@]}")
    local stage=("${options[@]}" launch/slurm/stage.sbatch "${container[@]}" "$step" --save "$run/$step")
    case $step in
    expanded | replay) preprocess "$step" "$shards" "${flags[@]}" ;;
    convert) submit "$step" "" "${tool[@]}" checkpoint_convert/hf_to_mcore.py --save "$run/upcycled" "${flags[@]}" ;;
    stage?)
        read -r start data <<<"$needs"
        submit "$step" "$needs" "${stage[@]}" --pretrained-checkpoint "$run/${start/convert/upcycled}" \
            --data-path "$run/data/${data}_text_document" "${flags[@]}"
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
read_steps "$@"
command -v sbatch >/dev/null || fail "sbatch is not installed; run this on a login node of the cluster"
mkdir -p "$run/slurm"
name=$(basename "$run")
plan "$@"
while [[ $# -gt 0 ]]; do
    arguments=("${1#@}")
    shift
    while [[ $# -gt 0 && $1 != @* ]]; do arguments+=("$1") && shift; done
    step "${arguments[@]}"
done
