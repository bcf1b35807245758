"""Manifests are what the published model of JobSet describes, and start tasks in their order."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from kubeflow_trainer_api import models

from moelpr.base import records
from moelpr.base.errors import UserError
from moelpr.project.workflow.kubernetes import Chain, KubernetesSettings, check, launch, states
from moelpr.project.workflow.task import Task
from moelpr.project.workflow.workflow import Workflow
from tests.support.programs import put_on_path

MODELS = {"ConfigMap": models.IoK8sApiCoreV1ConfigMap, "JobSet": models.JobsetV1alpha2JobSet}
REQUIRED = {"image": "registry/moelpr:1", "claim": "work", "folder": "/"}
ALL = {
    **REQUIRED,
    "namespace": "team",
    "training": {"memory": "1Ti", "rdma/ib": 8},
    "env": {"HF_HOME": "/data/hf"},
    "labels": {"team": "nlp"},
    "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
    "container": {
        "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
        "volumeMounts": [{"name": "more", "mountPath": "/more"}],
    },
    "secrets": ["hub"],
    "pod": {
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "volumes": [{"name": "more", "emptyDir": {}}],
        "terminationGracePeriodSeconds": 60,
    },
}


def settings(**values: Any) -> KubernetesSettings:
    return records.validate(KubernetesSettings, REQUIRED | values, "kubernetes", "correct it")


def tasks(run: Path) -> list[Task]:
    texts = [Task(name=f"preprocess-{code}", command=["moelpr", code], cpus=8) for code in ("el", "hu")]
    convert = Task(name="convert", command=["moelpr", "model", "convert"], memory_gib=16)
    made_from = ("convert", "preprocess-el", "preprocess-hu")
    stage1 = Task(name="stage1", command=["moelpr"], made_from=made_from, continues=run / "1", nodes=4, gpus_per_node=8)
    stage2 = replace(stage1, name="stage2", made_from=("stage1", "preprocess-el"), continues=run / "2")
    export = Task(name="export", command=["moelpr", "model", "export"], made_from=("stage2",))
    measure = Task(name="eval", command=["e"], made_from=("export",), gpus_per_node=1)
    return [*texts, convert, stage1, stage2, export, measure]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "languages.yaml"
    path.write_text("model: Qwen3-8B\n")
    return path


def manifests(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("values", [{}, ALL])
def test_manifests_have_only_fields_that_the_published_models_have(tmp_path, file, values) -> None:
    run = tmp_path / "Our_run"
    launch(Workflow(run, tasks(run)), settings(**values), file, render_only=True)
    actual = manifests(run / "kubernetes" / "our-run.yaml")
    assert [one["kind"] for one in actual] == ["ConfigMap", "JobSet"]
    for one in actual:
        model = MODELS[one["kind"]].from_dict(one)
        assert model is not None
        assert model.to_dict() == one  # unknown fields would be gone


def job_set(run: Path, file: Path, **values: Any) -> dict[str, Any]:
    launch(Workflow(run, tasks(run)), settings(**values), file, render_only=True)
    config, actual = manifests(run / "kubernetes" / "greek.yaml")
    assert config["data"] == {"languages.yaml": "model: Qwen3-8B\n"}
    return actual


def test_a_job_set_trains_on_several_nodes_and_tells_stops_from_failures(tmp_path, file) -> None:
    actual = job_set(tmp_path / "greek", file)
    jobs = {job["name"]: job for job in actual["spec"]["replicatedJobs"]}
    assert [need["name"] for need in jobs["stage1"]["dependsOn"]] == ["preprocess-el", "preprocess-hu", "convert"]
    assert jobs["stage2"]["dependsOn"] == [{"name": "stage1", "status": "Complete"}]  # the rest is behind it
    assert "dependsOn" not in jobs["convert"]
    spec = jobs["stage1"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    rules = spec["podFailurePolicy"]["rules"]
    codes = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules]
    assert codes == [("Ignore", None), ("Ignore", [75]), ("FailJob", [2])]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 1800
    [container] = pod["containers"]
    assert container["args"] == ["moelpr", "run", "/etc/moelpr/languages.yaml", "--task", "stage1"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    values = " ".join(f"{one['name']}={one.get('value')}" for one in container["env"])  # the rank is the pod's index
    assert values == (
        "PET_NNODES=4 PET_NPROC_PER_NODE=8 PET_MASTER_ADDR=greek-stage1-0-0.greek PET_MASTER_PORT=29500 "
        "MOELPR_GRACE_SECONDS=1800 JOIN_TIMEOUT=900 PET_NODE_RANK=None"
    )
    tool, gpu_tool = (
        jobs[name]["template"]["spec"]["template"]["spec"]["containers"][0] for name in ("preprocess-el", "eval")
    )
    assert tool["env"] == [] and tool["resources"]["requests"] == {"cpu": "8", "memory": "4Gi"}
    assert gpu_tool["resources"]["limits"]


def test_what_the_user_sets_reaches_the_pods(tmp_path, file) -> None:
    actual = job_set(tmp_path / "greek", file, **{key: value for key, value in ALL.items() if key not in REQUIRED})
    metadata = {"labels": ALL["labels"], "annotations": {"moelpr/output": str(tmp_path / "greek")}}
    assert actual["metadata"] == {"name": "greek", "namespace": "team"} | metadata
    stage1 = next(job for job in actual["spec"]["replicatedJobs"] if job["name"] == "stage1")
    assert stage1["template"]["spec"]["template"]["metadata"]["annotations"] == ALL["annotations"]
    pod = stage1["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["securityContext"] == ALL["container"]["securityContext"]
    assert [one["mountPath"] for one in pod["containers"][0]["volumeMounts"]][1:] == [
        "/etc/moelpr",
        "/dev/shm",
        "/more",
    ]
    assert pod["nodeSelector"] == {"gpu": "h100"} and pod["terminationGracePeriodSeconds"] == 60
    assert [volume["name"] for volume in pod["volumes"]] == ["work", "file", "shm", "more"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "1Ti", "rdma/ib": "8"}
    assert {"name": "HF_HOME", "value": "/data/hf"} in pod["containers"][0]["env"]


@examples(deadline=None)  # other work may keep the machine busy
@example([*(set[int]() for _ in range(11)), {*range(11)}])
@given(st.lists(st.sets(st.integers(0, 11)), min_size=1, max_size=12))
def test_a_task_starts_after_all_that_it_reads_whatever_the_chain(inputs: list[set[int]]) -> None:
    """JobSet takes at most five dependencies, on jobs further up."""
    chain = [
        Task(name=f"t{own}", command=["c"], made_from=tuple(f"t{name}" for name in sorted(names) if name < own))
        for own, names in enumerate(inputs)
    ]
    job_set = Chain(chain, Path("run"), settings(), Path("file")).job_set()
    after: dict[str, set[str]] = {}
    for job in job_set["spec"]["replicatedJobs"]:
        needs = [one["name"] for one in job.get("dependsOn", ())]
        assert len(needs) <= 5 and set(needs) <= after.keys()
        after[job["name"]] = set(needs).union(*(after[need] for need in needs))
    assert all(set(task.made_from) <= after[task.name] for task in chain)


@pytest.mark.parametrize("name", ["greek", "Runs_of " + 80 * "x", "2026 model", "\u03b5\u03bb"])
def test_names_of_pods_are_names_of_hosts(name: str) -> None:
    task = Task(name="preprocess-zho_Hant", command=["c"], nodes=128)
    chain = Chain([task], Path(name), settings(), Path("file"))
    pod = f"{chain.name}-{chain.job_set()['spec']['replicatedJobs'][0]['name']}-0-127-abcde"
    assert len(pod) <= 63 and re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", pod)  # as JobSet's webhook checks it
    other = Chain([task], Path(f"{name}2"), settings(), Path("file"))
    assert other.name != chain.name and len(other.name) <= 63


def test_the_tutorials_pod_has_what_its_project_names_and_the_rights_to_submit_it() -> None:
    examples = Path(__file__).parents[4] / "examples"
    claim, account, role, binding, pod = manifests(examples / "kubernetes-pod.yaml")
    for kind, one in (("PersistentVolumeClaim", claim), ("ServiceAccount", account), ("Pod", pod)):
        assert getattr(models, f"IoK8sApiCoreV1{kind}").from_dict(one).to_dict() == one
    content = yaml.safe_load((examples / "users" / "kubernetes-company.yaml").read_text())["kubernetes"]
    project = settings(**{"folder": "/work"} | content)
    rendered = Chain([Task(name="t", command=["c"])], Path("run"), project, Path("file")).job_set()
    spec = rendered["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (own,), (of_task,) = pod["spec"]["containers"], spec["containers"]
    assert pod["spec"]["volumes"][0] == spec["volumes"][0] and claim["metadata"]["name"] == project.claim
    assert own["volumeMounts"][0] == of_task["volumeMounts"][0]
    assert [own[key] for key in ("image", "workingDir", "env")] == [
        of_task[key] for key in ("image", "workingDir", "env")
    ]
    assert {one["secretRef"]["name"] for one in own["envFrom"]} < {*project.secrets}
    assert pod["spec"]["securityContext"] == spec["securityContext"]
    assert pod["spec"]["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    rights = {name: {*rule["verbs"]} for rule in role["rules"] for name in rule["resources"]}
    assert rights["jobsets"] >= {"get", "create", "patch", "delete", "list", "watch"}  # the last two: delete --wait
    assert rights["configmaps"] >= {"get", "create", "patch"}


# kubectl keeps objects as files, whose state the test writes.
KUBECTL = """case "$*" in
*get*) cat "$STUBS/greek" 2>/dev/null; true ;;
*) echo "$@" >>"$STUBS/calls" ;;
esac"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return put_on_path(monkeypatch, tmp_path / "bin", {"kubectl": KUBECTL})


def test_a_finished_job_set_is_replaced_and_a_running_one_is_not(tmp_path, file, kubectl) -> None:
    run = tmp_path / "greek"
    launch(Workflow(run, tasks(run)), settings(), file)
    assert (kubectl / "calls").read_text() == f"apply --filename {run}/kubernetes/greek.yaml\n"
    (kubectl / "greek").write_text('{"metadata": {}, "status": {}}')
    with pytest.raises(UserError, match=r"kubectl delete jobset greek"):
        launch(Workflow(run, tasks(run)), settings(), file)
    ended = '"status": {"conditions": [{"type": "Failed", "status": "True"}]}'
    (kubectl / "greek").write_text(f'{{"metadata": {{"annotations": {{"moelpr/output": "/other/greek"}}}}, {ended}}}')
    with pytest.raises(
        UserError, match="jobset greek is that of the project in /other/greek; give your output folder another name"
    ):
        launch(Workflow(run, tasks(run)), settings(), file)
    (kubectl / "greek").write_text(f'{{"metadata": {{}}, {ended}}}')
    launch(Workflow(run, tasks(run)), settings(namespace="team"), file)
    assert (kubectl / "calls").read_text().splitlines()[1:] == [
        "--namespace team delete jobset greek --wait --cascade foreground",
        f"--namespace team apply --filename {run}/kubernetes/greek.yaml",
    ]


def test_states_are_those_of_the_job_set_that_was_applied_last(tmp_path, file, kubectl) -> None:
    run = tmp_path / "greek"
    assert states(run, None) == {}
    launch(Workflow(run, tasks(run)), settings(), file)
    assert states(run, None) == {}
    jobs = [{"name": "convert", "succeeded": 1}, {"name": "stage1", "active": 1, "ready": 0}, {"name": "eval"}]
    jobs += [{"name": "stage2", "active": 1, "ready": 1}, {"name": "export", "failed": 1}]
    (kubectl / "greek").write_text(json.dumps({"status": {"replicatedJobsStatus": jobs}}))
    of = states(run, "team")
    assert of["convert"] == "job is complete" and of["stage1"] == "pods are pending or starting"
    assert (of["stage2"], of["export"], of["eval"]) == ("pods run", "failed, see kubectl logs", "job waits")
    (kubectl / "kubectl").write_text("#!/bin/sh\necho 'E0101 try\nno resource type \"jobset\"' >&2; exit 1\n")
    assert 'kubectl get fails (no resource type "jobset"); install JobSet' in states(run, None)[""]


def test_only_what_is_not_done_is_applied(tmp_path, file, kubectl) -> None:
    run = tmp_path / "greek"
    workflow = Workflow(run, [replace(task, is_complete=lambda: True) for task in tasks(run)])
    workflow.logs.mkdir(parents=True)

    def finish(*done: str) -> None:
        for name in done:
            workflow.adopt(name, str(next(one.id for one in workflow.outlook() if one.task.name == name)))
        launch(workflow, settings(), file)

    finish("preprocess-el", "preprocess-hu", "convert", "stage1", "stage2")
    names = [job["name"] for job in manifests(run / "kubernetes" / "greek.yaml")[1]["spec"]["replicatedJobs"]]
    assert names == ["export", "eval"]
    (kubectl / "calls").write_text("")
    finish("export", "eval")
    assert (kubectl / "calls").read_text() == ""


def test_what_is_missing_or_ours_is_one_sentence(tmp_path, file) -> None:
    for place, name in (("pod", "containers"), ("pod", "terminationGracePeriodSeconds"), ("container", "args")):
        with pytest.raises(UserError, match=rf"kubernetes.{place}.{name} is set by moelpr run; remove it"):
            check(settings(**{place: {name: []}}))
    for key, value in (
        ("claim", "My_Claim"),
        ("secrets", ["s3", "S3_keys"]),
        ("namespace", "NLP"),
        ("folder", "work"),
        ("env", {"A": True}),
        ("training", {"cpu": "96Gi"}),
        ("training", {"memory": "1.2.3Gi"}),
        ("training", {"cpus": 96}),
        *(("image", name) for name in ("https://registry/moelpr", "registry/Moelpr:1", "my image")),
    ):
        with pytest.raises(UserError, match=rf"kubernetes(\.|: ){key}"):
            check(settings(**{key: value}))
    with pytest.raises(UserError, match="kubernetes.training.nvidia.com/gpu follows from hardware; remove it"):
        check(settings(training={"nvidia.com/gpu": 4}))
    assert settings(env={"A": 0, "B": "true"}).env == {"A": "0", "B": "true"}
    check(settings(training={"memory": "1Ti", "cpu": 96}, secrets=["s3.keys"], namespace="a"))
    for name in ("moelpr", "REGISTRY/moelpr:0.2.0-RC1", f"r.io:5000/a/b_c@sha256:{64 * '0'}"):
        check(settings(image=name))
    needy = [replace(task, memory_gib=90.5) for task in tasks(tmp_path)]
    for memory in ("90Gi", "97G", 10**10):
        with pytest.raises(UserError, match="kubernetes.training.memory is .*, but stage1 needs 91Gi of each node"):
            launch(Workflow(tmp_path, needy), settings(training={"memory": memory}), file, render_only=True)
    for memory in ("91Gi", "98G", "1Ti", 10**12):
        launch(Workflow(tmp_path, needy), settings(training={"memory": memory}), file, render_only=True)
    of_pods = {"languages": ["/more/el", "el/*.jsonl", "s3://bucket/el", None], "model": ["owner/name", "/claim/base"]}
    check(settings(folder="/claim", container={"volumeMounts": [{"mountPath": "/more"}]}), of_pods)
    with pytest.raises(UserError, match="^languages: pods have no /more/el; put it below kubernetes.folder, /claim"):
        check(settings(folder="/claim"), of_pods)
    with pytest.raises(UserError, match="kubernetes.container.volumeMounts must be a list"):
        check(settings(container={"volumeMounts": "/more"}))
    with pytest.raises(UserError, match="kubernetes.claim is missing, .*; add it"):
        check(KubernetesSettings(image="i"))


@pytest.mark.parametrize("name", ["a b.yaml", "ä.yaml"])
def test_the_key_of_any_file_is_one_of_kubernetes(tmp_path, file, name: str) -> None:
    run = tmp_path / "greek"
    launch(Workflow(run, tasks(run)), settings(), file.rename(file.with_name(name)), render_only=True)
    config_map, job_set = manifests(run / "kubernetes" / "greek.yaml")
    (key,) = config_map["data"]
    assert re.fullmatch(r"[-._a-zA-Z0-9]+", key) and f"/{key}" in str(job_set)
