import contextlib

import pytest

from tests.monitoring.watching import Webhook


@pytest.fixture
def webhook():
    with contextlib.closing(Webhook()) as webhook:
        yield webhook
