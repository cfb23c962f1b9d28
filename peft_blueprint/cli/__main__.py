"""`python -m peft_blueprint.cli`."""

from .program import main


main()
