"""Putting layers into networks and taking them out again.

`plan` says what `convert` would do; `to_batchnorm` goes back to plain torch; `fold` merges norms
into the layers before them.
"""

from anybatch.conversion.convert import convert as convert
from anybatch.conversion.fold import fold as fold
from anybatch.conversion.plan import Plan as Plan
from anybatch.conversion.plan import PlanRow as PlanRow
from anybatch.conversion.plan import plan as plan
from anybatch.conversion.restore import to_batchnorm as to_batchnorm
from anybatch.conversion.surgery import NoEffectWarning as NoEffectWarning
