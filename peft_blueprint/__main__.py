"""`python -m peft_blueprint`, the same as the command `peft-blueprint`."""

from .cli.program import main


main()
