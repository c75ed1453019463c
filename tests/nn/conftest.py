"""Small layers: one thread, because at these sizes a second one only waits."""

from tests.threads import on_one_thread  # noqa: F401
