"""Races in kernels on simulated memory."""


def collected(monkeypatch):
    """The race detectors that the simulator makes from now on: one a kernel, of which it keeps the last alone."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    made, original = [], simulator.RaceDetectionState

    def make(*arguments, **named):
        made.append(original(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(simulator, "RaceDetectionState", make)
    return made
