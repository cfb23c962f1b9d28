"""`python -m peft_blueprint.cli`."""

from .app import main


main()
