"""Answers nnU-Net's search for a trainer name, and says on standard error what the search itself cannot."""

import sys

PREFIX = "nnUNetTrainer"

# nnU-Net drops the module that asks after every search; "once" has to be remembered here.
_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        print(f"nnunet_dyn: {message}", file=sys.stderr)


def find_trainer(name: str) -> type:
    """Return the trainer class called `name`.

    Raises AttributeError, and nothing else, for any other name. A name that resembles one of this package's
    gets a hint on standard error.
    """
    if name.startswith(PREFIX):
        try:
            from nnunet_dyn import trainers

            found = getattr(trainers, name, None)
            if found is not None:
                return found
            if close := trainers.suggest(name):
                _say_once(f"this package has no trainer called {name}. Did you mean {' or '.join(close)}?")
        except Exception as error:
            _say_once(
                f"cannot look for {name}: importing the trainers failed with {type(error).__name__}: {error}. "
                "Run 'nnunet_dyn doctor' for the remedy."
            )
    raise AttributeError(f"nnunet_dyn has no trainer called {name!r}")
