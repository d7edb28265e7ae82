"""A cluster of the tests' own, and a user of it."""

import pytest
import tomli_w

from tests.k8s.api import Api
from tests.launcher.shell import JOB, Shell


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with Api(tmp_path_factory.mktemp("api")) as api:
        yield api


@pytest.fixture
def space(api, request):
    """A namespace of this test's own."""
    name = f"n{abs(hash(request.node.name)) % 10**8}"
    api.namespace(name, **{"pod-security.kubernetes.io/enforce": "restricted"})
    return name


@pytest.fixture
def shell(api, space, tmp_path):
    (tmp_path / "job.toml").write_text(tomli_w.dumps(JOB))
    return Shell(tmp_path, api.kubeconfig(space, namespace=space))
