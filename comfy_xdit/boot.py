"""Run one of our modules in a fresh process of the same interpreter: `python boot.py MODULE [ARG ...]`.

A worker is started from a checkout that is not installed, so the first thing it does is to mount our
packages; and it must not find this script's folder, nor ComfyUI's, at the front of its path.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec_globals = runpy.run_path(str(here / "mount.py"))
    names = {"comfy_xdit", "comfy_xdit_worker", sys.argv[1].partition(".")[0]}
    spec_globals["mount"](*sorted(names & set(spec_globals["PACKAGES"])))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
