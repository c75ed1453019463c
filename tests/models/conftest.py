"""Tiny models: one thread, because at these sizes a second one only waits."""

from torch.utils._device import _device_constructors

from tests.threads import on_one_thread  # noqa: F401

# `with torch.device("meta")` lists torch.empty among the functions that it redirects when it is first used, and keeps
# that list: it must see the function itself, not the one that poisons memory.
_device_constructors()
