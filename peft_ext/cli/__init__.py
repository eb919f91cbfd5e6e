"""What the command `peft-ext` does: a module for each subcommand, imported when it is run by `peft_ext_cli`."""

from peft_ext_cli import main


__all__ = ["main"]
