"""All manifests are what several versions of Kubernetes take: no field unknown, missing or of another type.

make test-kubernetes
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import ValidationError, validate

from moelpr.project.workflow.kubernetes import Chain
from tests.unit.project.workflow.test_kubernetes import ALL, settings, tasks

EXAMPLES = Path(__file__).parents[2] / "examples"
VERSIONS = ["1.29", "1.33", "1.37"]
COMPANY = yaml.safe_load((EXAMPLES / "users" / "kubernetes-company.yaml").read_text())["kubernetes"]


def objects(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a project's ConfigMap, and each job of its JobSet, which is not a kind of Kubernetes itself, as a Job."""
    chain = Chain(tasks(Path("run")), Path("run"), settings(**values), EXAMPLES / "languages.yaml")
    yield chain.config_map()
    for job in chain.job_set()["spec"]["replicatedJobs"]:
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_of_a_project_and_of_the_tutorial_are_valid(version: str) -> None:
    applied = [one for values in ({}, ALL, COMPANY) for one in objects(values)]
    of_tutorial = [*yaml.safe_load_all((EXAMPLES / "kubernetes-pod.yaml").read_text())]
    assert {one["kind"] for one in of_tutorial} >= {"Pod", "Role", "RoleBinding"} and len(applied) == 3 * 8
    for one in [*applied, *of_tutorial]:
        validate(one, version, strict=True)
    with pytest.raises(ValidationError, match="parallelisms"):
        validate(applied[-1] | {"spec": {**applied[-1]["spec"], "parallelisms": 1}}, version, strict=True)
