"""Running a model's ``forward`` so that the model and the rest of the program do not notice.

:class:`Copier` makes a throw-away copy of the model to run it on; :func:`undisturbed` puts back what ``forward``
reaches besides.
"""

from locoprop_torch.isolation.copier import Copier
from locoprop_torch.isolation.objects import is_opaque, uncompiled
from locoprop_torch.isolation.outside import undisturbed

__all__ = ["Copier", "is_opaque", "uncompiled", "undisturbed"]
