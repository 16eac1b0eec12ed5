"""Entry point of ``python -m hybridnas.ladder``; imported as a module, it can still be called as the function."""

import sys
import types
from typing import Any

from hybridnas.cli import main


class _Callable(types.ModuleType):
    """``import hybridnas.ladder`` puts this module in the place of the function ``hybridnas.ladder``."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        from hybridnas.ladders.ladder import ladder

        return ladder(*args, **settings)


if __name__ == "__main__":
    main(["ladder", *sys.argv[1:]])
else:
    sys.modules[__name__].__class__ = _Callable
