"""What the operator and we refuse in a RayJob beyond its schema: an API server would take it."""

import re
from collections.abc import Iterator

LEAST_RAY = (2, 54)  # token authentication that workers keep to
LONGEST_NAME = 47  # the operator adds to it what has to stay below 64
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035, as names of services are
DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


def lint(job: dict, allow_tag: bool = False) -> list[tuple[str, str]]:
    """(field, what is wrong with it) of a RayJob. allow_tag: an image need not be named by its digest."""
    return list(_lint(job["metadata"]["name"], job["spec"], allow_tag))


def _lint(name: str, spec: dict, allow_tag: bool) -> Iterator[tuple[str, str]]:
    if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        yield "metadata.name", (f"{name!r} is no name for a RayJob: at most {LONGEST_NAME} lower-case letters, digits "
                                "and dashes, the first a letter, the last no dash")  # fmt: skip
    cluster = spec.get("rayClusterSpec", {})
    if not spec.get("shutdownAfterJobFinishes"):
        for key in ("suspend", "ttlSecondsAfterFinished"):
            if spec.get(key):
                yield f"spec.{key}", "needs shutdownAfterJobFinishes"
    if spec.get("clusterSelector"):
        for key in ("backoffLimit", "suspend"):
            if spec.get(key):
                yield f"spec.{key}", "cannot be with clusterSelector, which names a cluster that is there already"
    if spec.get("submissionMode") in ("SidecarMode", "HTTPMode", "InteractiveMode") and "submitterPodTemplate" in spec:
        yield "spec.submitterPodTemplate", f"has no place in {spec['submissionMode']}"
    release = cluster.get("rayVersion", "")
    numbers = tuple(map(int, re.findall(r"\d+", release)[:2]))
    if numbers < LEAST_RAY:
        yield "spec.rayClusterSpec.rayVersion", f"{release or 'none'} is older than {'.'.join(map(str, LEAST_RAY))}"
    options = cluster.get("authOptions", {})
    if options.get("mode") != "token":
        yield (
            "spec.rayClusterSpec.authOptions.mode",
            "has to be token, or whoever reaches the cluster may run code there",
        )
    if options.get("enableK8sTokenAuth"):
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", "is refused for a RayJob"
    head = cluster.get("headGroupSpec", {}).get("template", {}).get("spec", {}).get("containers", [{}])[0]
    if (named := [port["name"] for port in head.get("ports", ())]) and "dashboard" not in named:
        yield "spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].ports", (
            "name no dashboard: the operator makes the head's service of these alone")  # fmt: skip
    for path, pod in pods(spec):
        if pod["spec"].get("automountServiceAccountToken") is not False:
            yield f"{path}.spec.automountServiceAccountToken", "has to be false: no code in a pod asks the cluster"
        for container in pod["spec"]["containers"]:
            if not allow_tag and not DIGEST.fullmatch(container["image"]):
                yield f"{path}.spec.containers[{container['name']}].image", (
                    f"{container['image'] or 'nothing'!r} is not named by its digest: NAME@sha256:...")  # fmt: skip


def pods(spec: dict) -> Iterator[tuple[str, dict]]:
    """The pod templates of a RayJob's spec, each with its path."""
    cluster = spec.get("rayClusterSpec", {})
    if "submitterPodTemplate" in spec:
        yield "spec.submitterPodTemplate", spec["submitterPodTemplate"]
    if "headGroupSpec" in cluster:
        yield "spec.rayClusterSpec.headGroupSpec.template", cluster["headGroupSpec"]["template"]
    for number, group in enumerate(cluster.get("workerGroupSpecs", [])):
        yield f"spec.rayClusterSpec.workerGroupSpecs[{number}].template", group["template"]
