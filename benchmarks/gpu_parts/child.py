"""A part's own process: `python -m gpu_parts.child ORDER`, see `runner.build_order`.

stdout is progress; stderr, with whatever libraries have to say, is the part's log.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
import traceback
from pathlib import Path

from gpu_parts.context import Context, FailedError, Settings, SkippedError


def main() -> int:
    # Asked to end, it closes its workers on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    order = json.loads(sys.argv[1])
    context = Context(order["part"], order["arguments"], Settings(**order["settings"]), Path(order["rows"]))
    module, _, function = order["entry"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(context)
    except SkippedError as error:
        context.finish("skipped", str(error))
    except FailedError as error:
        context.finish("failed", str(error))
        return 1
    except Exception as error:  # a part that goes wrong is a result: the others still run
        traceback.print_exc()
        text = " ".join(str(error).split())
        context.finish("failed", f"{type(error).__name__}: {text}"[:300])
        return 1
    else:
        context.finish("ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
