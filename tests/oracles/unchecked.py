"""Calling with what a type checker refuses: a user has none, and must get our own line."""


def unchecked(make):
    """Runs `make`; where the test run checks annotations at run time, that check would come first, so it is switched off."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return make()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
