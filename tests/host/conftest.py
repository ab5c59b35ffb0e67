"""Which ComfyUI checkouts the host tests run in.

Two versions can't be imported into one process, so the tests proper (`inside/check_*.py`) run in a
process for each checkout, with that checkout's own Python.
"""

import pytest
from comfy_xdit_bench.hosts import checkouts


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "checkout" in metafunc.fixturenames:
        found = checkouts()
        sentence = "no ComfyUI checkout: set COMFYUI_DIR, or put one beside this checkout or at ~/ComfyUI"
        none = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=sentence))]
        params = [pytest.param(path, id=path.name) for path in found] or none
        # Session scope: a fixture may start one server for all tests of a checkout.
        metafunc.parametrize("checkout", params, scope="session")
