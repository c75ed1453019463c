"""Calls on rows that were seen before neither wait for a device nor copy to it, on a device that notices."""

import re
from pathlib import Path

import pytest
from torch.utils import backend_registration

from tests import interpreting


def test_on_a_device_that_notices():
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot pretend a device")
    done = interpreting.run(Path(__file__).with_name("pretended.py"))
    assert done.returncode == 0 and int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 30, done.stdout[-4000:]
