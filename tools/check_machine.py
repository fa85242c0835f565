"""Says in one line what this machine lacks to build specengine; runs on any Python 3, before anything is installed.

python3 tools/check_machine.py
"""

import os
import shutil
import sys
import sysconfig


def first_problem():
    """What to install first, or None."""
    if sys.version_info < (3, 10):
        return "Python 3.10 or newer is needed, %s is %d.%d; choose another: make PYTHON=python3.11 ..." % (
            sys.executable,
            sys.version_info[0],
            sys.version_info[1],
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "Python's venv module is missing; install it (Debian: apt-get install python3-venv)"
    if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++"):
        return "no C++ compiler was found; install one (Debian: apt-get install g++) or set CXX"
    if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
        return "Python's headers are missing; install them (Debian: apt-get install python3-dev)"
    return None


if __name__ == "__main__":
    problem = first_problem()
    if problem:
        sys.exit("specengine: " + problem)
