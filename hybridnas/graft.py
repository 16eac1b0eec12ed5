"""Entry point of ``python -m hybridnas.graft``; imported as a module, it can still be called as the function."""

import sys
import types
from typing import Any

from hybridnas.cli import main


class _Callable(types.ModuleType):
    """``import hybridnas.graft`` puts this module in the place of the function ``hybridnas.graft``."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from hybridnas.grafting.operation import graft

        return graft(*args, **settings)


if __name__ == "__main__":
    main(["graft", *sys.argv[1:]])
else:
    sys.modules[__name__].__class__ = _Callable
