"""`python -m peft_ext`: the same as the command `peft-ext`."""

from .cli import main


raise SystemExit(main())
