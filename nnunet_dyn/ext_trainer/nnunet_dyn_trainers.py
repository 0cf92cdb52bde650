"""Re-exports every trainer of this package, by name, to nnU-Net's search.

A name it does not have must raise AttributeError and nothing else: any other error ends the search before
the user's other trainer directories are reached.
"""


def __getattr__(name: str) -> type:
    try:
        from nnunet_dyn._lookup import find_trainer
    except Exception:
        # A program of another environment inherited the variable and has no nnunet_dyn of its own.
        raise AttributeError(f"nnunet_dyn cannot be imported here, so it has no {name!r}") from None
    return find_trainer(name)
