"""The Triton backend's plans of past steps, which it keeps and shows to nobody: the tests' one look at them."""

from locoprop_kernels.kernels import drivers


def kept_plans():
    """The plans that are kept, the one used last at the end."""
    return list(drivers._plans.values())


def forget_plans():
    """Every step that follows makes its plan anew."""
    drivers._plans.clear()


def keep_at_most(monkeypatch, count):
    """No plans are kept so far, and from now on no more than these."""
    monkeypatch.setattr(drivers, "_KEPT_PLANS", count)
    monkeypatch.setattr(drivers, "_plans", type(drivers._plans)())
