"""The ``lightning-nas`` command: Lightning's own, for a module, data and callbacks written in YAML.

lightning-nas fit --config instatune_vit.yaml --data.init_args.batch_size 64
"""

from __future__ import annotations

from pytorch_lightning.cli import ArgsType, LightningCLI

__all__ = ["main"]


def main(args: ArgsType = None) -> None:
    """Run a subcommand of ``LightningCLI``: ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: in place of those of the command line.
    """
    LightningCLI(args=args)


if __name__ == "__main__":
    main()
