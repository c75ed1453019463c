from tests.lowrank_linear.conftest import quiet  # noqa: F401 - one thread for tests without compiled kernels
