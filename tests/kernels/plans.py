"""The Triton backend's plans of past steps, which it keeps and shows to nobody: the tests' one look at them."""

from locoprop_kernels.kernels import run


def kept_plans():
    """The plans that are kept, the one used last at the end."""
    return [plan for step in run._steps.values() for plan in step.plans]


def forget_plans():
    """Every step that follows makes its plan anew."""
    run._steps.clear()


def keep_at_most(monkeypatch, count):
    """No plans are kept so far, and from now on those of no more steps than these."""
    monkeypatch.setattr(run, "_KEPT_STEPS", count)
    plans_of_their_own(monkeypatch)


def plans_of_their_own(monkeypatch):
    """No plans are kept so far, and those of this test go with it."""
    monkeypatch.setattr(run, "_steps", type(run._steps)())
