"""What a namespace's Pod Security level refuses: the 'baseline' and 'restricted' standards of Kubernetes."""

from collections.abc import Iterator

BASELINE_CAPABILITIES = {"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD",
                         "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"}  # fmt: skip
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim",
                      "projected", "secret"}  # fmt: skip


def violations(pod: dict, level: str) -> list[str]:
    """Of a pod's spec, at the level "privileged", "baseline" or "restricted"."""
    if level == "privileged":
        return []
    return list(_baseline(pod)) + (list(_restricted(pod)) if level == "restricted" else [])


def _containers(pod: dict) -> Iterator[dict]:
    for key in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod.get(key) or ()


def _settings(pod: dict, container: dict) -> tuple[dict, set[str], str | None]:
    """(the container's security context over the pod's, the capabilities it adds, its seccomp profile's type)."""
    own = container.get("securityContext") or {}
    whole = (pod.get("securityContext") or {}) | own
    added = set((own.get("capabilities") or {}).get("add") or ())
    return whole, added, (whole.get("seccompProfile") or {}).get("type")


def _baseline(pod: dict) -> Iterator[str]:
    yield from (f"host namespaces ({key}=true)" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))
    yield from (f"hostPath volumes ({one['name']})" for one in pod.get("volumes") or () if "hostPath" in one)
    for container in _containers(pod):
        name, (whole, added, seccomp) = container["name"], _settings(pod, container)
        if whole.get("privileged"):
            yield f"privileged ({name})"
        if added - BASELINE_CAPABILITIES:
            yield f"non-default capabilities ({name} adds {sorted(added - BASELINE_CAPABILITIES)})"
        if any(port.get("hostPort") for port in container.get("ports") or ()):
            yield f"hostPort ({name})"
        if seccomp == "Unconfined":
            yield f"seccompProfile Unconfined ({name})"


def _restricted(pod: dict) -> Iterator[str]:
    for volume in pod.get("volumes") or ():
        if not set(volume) - {"name"} <= RESTRICTED_VOLUMES:
            yield f"restricted volume types ({volume['name']})"
    for container in _containers(pod):
        name, (whole, added, seccomp) = container["name"], _settings(pod, container)
        dropped = ((container.get("securityContext") or {}).get("capabilities") or {}).get("drop") or ()
        if (container.get("securityContext") or {}).get("allowPrivilegeEscalation") is not False:
            yield f"allowPrivilegeEscalation != false ({name})"
        if "ALL" not in dropped or added - {"NET_BIND_SERVICE"}:
            yield f"unrestricted capabilities ({name} must drop ALL, and add NET_BIND_SERVICE at most)"
        if whole.get("runAsNonRoot") is not True:
            yield f"runAsNonRoot != true ({name})"
        if whole.get("runAsUser") == 0:
            yield f"runAsUser=0 ({name})"
        if seccomp not in ("RuntimeDefault", "Localhost"):
            yield f"seccompProfile ({name} must set RuntimeDefault or Localhost)"
