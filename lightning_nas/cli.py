"""The ``lightning-nas`` command: Lightning's own for training, ``join`` for a further machine of a search.

lightning-nas fit --config instatune_vit.yaml --data.init_args.batch_size 64
lightning-nas join measure:make --storage postgresql+psycopg://me@host/searches --name vit
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_nas.errors import NASError
from lightning_nas.registry import nearest
from lightning_nas.study import join

if TYPE_CHECKING:
    from pytorch_lightning.cli import ArgsType

__all__ = ["main"]

_JOIN = "Another command, join, works on a search that another machine began: lightning-nas join --help"


def main(args: ArgsType = None) -> None:
    """Run ``join``, or a subcommand of ``LightningCLI``: ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: in place of those of the command line.
    """
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given[:1] == ["join"]:
        _join(given[1:])
        return
    from pytorch_lightning.cli import LightningCLI

    LightningCLI(args=args, parser_kwargs={"epilog": _JOIN})


def _join(args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="lightning-nas join", description="Work on a search that another machine began."
    )
    parser.add_argument(
        "function",
        type=str,
        help="PACKAGE.MODULE:FUNCTION, called without arguments; it returns evaluate, or (evaluate, costs). "
        "Modules of the present folder are found too.",
    )
    parser.add_function_arguments(join, skip={"evaluate", "costs", "on_candidate"}, fail_untyped=False)
    given = parser.parse_args(args)
    settings = parser.instantiate(given).as_dict()
    before = signal.signal(signal.SIGTERM, _leave)  # a stopped worker leaves no claim behind
    try:
        evaluate, costs = _made(settings.pop("function"))
        join(evaluate, costs=costs, **settings)
    except NASError as error:
        sys.exit(f"lightning-nas {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _made(function: str) -> tuple[Any, Any]:
    """What the user's function returns, as evaluate and costs."""
    module, _, name = function.partition(":")
    if not name:
        sys.exit(f"lightning-nas join: function must be PACKAGE.MODULE:FUNCTION, got {function!r}.")
    sys.path.insert(0, str(Path.cwd()))
    found = import_module(module)
    if not hasattr(found, name):
        names = [known for known in vars(found) if not known.startswith("_")]
        sys.exit(f"lightning-nas join: module {module} has no function {name!r}. {nearest(name, names)}")
    made = getattr(found, name)()
    return made if isinstance(made, tuple) else (made, ())


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
