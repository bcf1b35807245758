"""Text of `moelpr plan` and `moelpr status`."""

import math
from collections.abc import Iterable

from moelpr.base.errors import MachineError, UserError
from moelpr.base.machine import format_bytes
from moelpr.base.quantities import format_count, format_minutes
from moelpr.base.text_tables import table_text
from moelpr.data.mixing import share_table
from moelpr.measure.report.findings import LEAST_KEPT, MOST_DISTANCE
from moelpr.measure.report.runs import read_run
from moelpr.plan.candidates import Candidate
from moelpr.plan.gpus import GIB
from moelpr.plan.stage_plan import parameters
from moelpr.project.budget import expected_shares, step_tokens, tokens_or_estimates, total_tokens
from moelpr.project.resolved import ResolvedProject
from moelpr.project.steps.steps import tasks_of
from moelpr.project.steps.training import expected_tokens
from moelpr.project.verdict import verdict
from moelpr.project.workflow import kubernetes
from moelpr.project.workflow.slurm import Chain
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Outlook, Workflow


def plan(project: ResolvedProject) -> str:
    """List the steps and their needs, and the languages and how often their text is read."""
    outlooks = Workflow(project.folder, tasks_of(project)).outlook()
    if refusals := [outlook.refusal for outlook in outlooks if outlook.task.shared and outlook.refusal]:
        raise UserError(refusals[0])
    for outlook in outlooks:
        if outlook.task.missing and outlook.state != "done":
            raise outlook.task.missing
    rows = [[outlook.task.name, _state(outlook), *_needs(project, outlook.task)] for outlook in outlooks]
    head = ["step", "state", "time", "GPU hours", "GPU memory", "host memory", "disk", "layout"]
    left = [outlook.task for outlook in outlooks if outlook.state != "done" and not outlook.task.is_spare]
    disk, remote = sum(task.disk_gib for task in left), {uri: of for task in left for uri, of in task.versions.items()}
    copies = sum(int(of.split()[0]) for of in remote.values())
    place = f", and {format_bytes(copies)} in the cache of Hugging Face (HF_HOME)" if copies else ""
    time, hours = _sum_of([task.minutes for task in left]), sum(map(_gpu_hours, left))
    parts = [
        f"Fits: {_fits(project, left)}. Left: {time}, {hours:,.0f} GPU hours, {format_bytes(disk * GIB)} of disk "
        f"in {' and '.join(dict.fromkeys(map(str, (project.folder, project.text))))}{place}.",
        table_text(head, rows, text_columns=(0, 1, 7)),
        *filter(None, [changes(outlooks).rstrip()]),
    ]
    parts += [_experts(project)] if project.content.has_experts else []
    if not project.content.corpora:
        parts += [_languages(project, stage) for stage in project.parts]
    if any(outlook.task.is_spare for outlook in outlooks):
        parts.append(
            f"Steps with ? follow only if the second FFN is more than {MOST_DISTANCE} nats per token from the base, "
            f"keeps less than {LEAST_KEPT:.0%} of what it has learned, or is no better than the base; these sums are "
            "without them."
        )
    if project.layouts.cluster is None:
        parts.append("This machine's CPU is used, whose speed is not predicted.")
    return "\n\n".join(parts)


def _fits(project: ResolvedProject, tasks: list[Task]) -> str:
    """Whether tasks fit: GPUs have a layout, or there was an error; of this machine, also its memory and disk."""
    try:
        if project.content.hardware.gpu in ("auto", "none"):
            Workflow(project.folder, tasks).check_machine()
    except MachineError as error:
        return f"no, {error}"
    cluster = project.layouts.cluster
    if not cluster or project.main_stage != "lora":
        needed = max((task.memory_gib for task in tasks), default=0.0)
        is_here = project.content.hardware.gpu in ("auto", "none") or not tasks
        return "yes" if is_here else f"yes, on machines with {format_bytes(needed * GIB)} of memory"
    return f"not predicted; lora uses {project.layouts.of('lora').gpus_per_node} of {cluster.gpus} GPUs"


def _gpu_hours(task: Task) -> float:
    return (task.minutes or 0) / 60 * task.nodes * task.gpus_per_node


def status(project: ResolvedProject) -> str:
    """Tell which steps are done, which run, and when the rest will be."""
    project.layouts.counts_cpu_memory = False
    workflow = Workflow(project.folder, tasks_of(project))
    outlooks, took = workflow.outlook(), workflow.wall_times_s()
    rows, left = [], []
    finished = [outlook.task.name for outlook in outlooks if outlook.state == "done"]
    jobs = Chain(workflow, project.content.slurm, project.file.path).states(finished)
    pods = kubernetes.states(project.folder, project.content.kubernetes.namespace)
    for outlook in outlooks:
        if outlook.state == "done":
            time = format_minutes(took[outlook.task.name] / 60) if outlook.task.is_needed else ""
            rows.append([outlook.task.name, _state(outlook), "", time])
            continue
        is_new = outlook.state == "again"
        progress, minutes = (None if is_new else _progress(outlook.task)) or ("", outlook.task.minutes)
        progress = "; ".join(
            filter(None, [progress, jobs.get(outlook.task.name), pods.get(kubernetes.label(outlook.task.name))])
        )
        left += [] if outlook.task.is_spare else [minutes]
        rows.append([outlook.task.name, _state(outlook), progress, format_minutes(minutes)])
    table = table_text(["step", "state", "progress", "took, or left"], rows, text_columns=(0, 1, 2))
    table += f"\n\n{pods['']}" if "" in pods else ""
    if not left:
        return f"{table}\n{verdict(project)}"
    return f"{table}\n\n{len(finished)} of {len(rows)} steps are done; left: {_sum_of(left)}."


def _state(outlook: Outlook) -> str:
    if not outlook.task.is_needed:
        return "not needed"
    return f"{outlook.state}?" if outlook.task.is_spare else outlook.state


def changes(outlooks: Iterable[Outlook]) -> str:
    """List the steps that will be done again, and why; empty without any."""
    again = [
        f"  {outlook.task.name}: {outlook.reason}"
        + (f"; moelpr run asks for --redo {outlook.task.name}" if outlook.refusal else "")
        for outlook in outlooks
        if outlook.state == "again"
    ]
    return "\n".join(["Done again:", *again, ""]) if again else ""


def _sum_of(minutes: list[float | None]) -> str:
    known = [number for number in minutes if number is not None]
    if not sum(known) and len(known) < len(minutes):
        return "unknown time"
    return "about " + format_minutes(sum(known)) + (" without steps marked –" if len(known) < len(minutes) else "")


def _needs(project: ResolvedProject, task: Task) -> list[str]:
    gpus = task.nodes * task.gpus_per_node
    plan = project.layouts.of(task.name.partition("-")[0]).plan if task.name in project.stages else None
    return [
        format_minutes(task.minutes),
        f"{_gpu_hours(task):,.0f}" if gpus and task.minutes is not None else "",
        f"{plan.memory_bytes / GIB:.1f} of {plan.cluster.gpu_memory_gib:g} GiB" if plan else "",
        format_bytes(task.memory_gib * GIB),
        format_bytes(task.disk_gib * GIB) if task.disk_gib >= 0.01 else "",
        _layout(gpus, plan.best, plan.spec.moe is not None) if plan else "",
    ]


def _layout(gpus: int, best: Candidate, has_experts: bool) -> str:
    layout = best.layout
    etp = layout.etp if has_experts else 1
    sizes = {"TP": layout.tp, "PP": layout.pp, "EP": layout.ep, "ETP": etp, "DP": layout.dp}
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    parts += [f"recompute {layout.recompute}"] if layout.recompute != "none" else []
    return f"{gpus} GPU{'s' if gpus > 1 else ''}: {' '.join(parts) or 'all on one'}"


def _experts(project: ResolvedProject) -> str:
    """The new experts, the size of the model with them, and what stage 1 takes with another number of them."""
    layouts, languages, is_routed = project.layouts, len(project.expanded), project.main_stage == "stage1"
    number = layouts.num_new_experts
    lines = [f"New experts: N = {number} ({'given' if project.content.experts.new else 'auto'})"]
    if layouts.cluster is not None and (moe := layouts.result.moe) is not None:
        total, active = map(format_count, parameters(layouts.result))
        lines[0] += f" in each of {len(moe.layers)} layers, K = {moe.topk}"
        lines[0] += f", copies of the original expert: {moe.original_copies}"
        lines.append(f"The model: {total} parameters, {active} active per token")
        others = [(f"Stage 1 with N = {other}", its) for other, its in layouts.other_numbers()] if is_routed else []
        for spec, its in layouts.of_one_choice() if is_routed else ():
            others.append((f"With method: auto, {format_count(parameters(spec)[0])} parameters, stage ffn", its))
        for what, its in others:
            hours = (expected_tokens(project, "stage1") or 1) / 3600 / (its.tokens_per_s or math.inf)
            time = f"{format_minutes(60 * hours / its.cluster.gpus)}, {hours:,.0f} GPU hours, " if hours else ""
            lines.append(f"{what}: {time}{its.memory_bytes / GIB:.1f} GiB")
    if is_routed and number < languages:
        lines.append(f"warning: N = {number} is less than the number of expanded languages, {languages}")
    return ".\n".join(lines) + "."


def _languages(project: ResolvedProject, stage: str) -> str:
    tokens, is_estimate = tokens_or_estimates(project, stage)
    total, its = total_tokens(project, tokens), expected_shares(project, stage)
    table, is_most = share_table(its.items(), "language"), any(its[code].tokens != tokens[code] for code in its)
    note = ", here at most, as the estimate is too little text" if is_most else ""
    note = f" (tokens are estimated{note})" if is_estimate else ""
    text = f"Stage {stage.removeprefix('stage')} reads {format_count(total)} tokens{note}:\n{table}"
    if total >= (step := step_tokens(project, project.main_stage)):
        return text
    return (
        f"{text}\nwarning: if the estimate is right, these are less than one step, {step:,} tokens, and training is "
        f"refused; add text, or lower steps.{project.main_stage}.global-batch-size"
    )


def _progress(task: Task) -> tuple[str, float] | None:
    """Steps of a training that has started, and the minutes that are left."""
    if task.continues is None:
        return None
    try:
        run = read_run(task.continues)
    except UserError:  # it has not made a step
        return None
    slow = [warning["message"] for warning in run.metrics.warnings if warning["kind"] == "slow_node"]
    # Whether it still runs is not known: it may on another machine.
    state = f"the last {format_minutes(run.last_record_age_s / 60)} ago" if run.state == "running" else run.state
    return "; ".join([f"step {run.progress} ({state})", *slow[-1:]]), run.time_left_s / 60
