"""Putting layers into networks and taking them out again.

`plan` says what `convert` would do; `to_batchnorm` goes back to plain torch; `fold` merges norms
into the layers before them; `param_groups` gives an optimizer the groups that suit the norms.
"""

from anybatch.conversion.convert import convert as convert
from anybatch.conversion.factory import norm_layer as norm_layer
from anybatch.conversion.fold import fold as fold
from anybatch.conversion.gamma_decay import GammaDecay as GammaDecay
from anybatch.conversion.norm_copies import keep_copy as keep_copy
from anybatch.conversion.norm_copies import norm_keys as norm_keys
from anybatch.conversion.plan import plan as plan
from anybatch.conversion.plan_table import Plan as Plan
from anybatch.conversion.plan_table import PlanRow as PlanRow
from anybatch.conversion.restore import plain_state_dict as plain_state_dict
from anybatch.conversion.restore import to_batchnorm as to_batchnorm
from anybatch.conversion.weight_decay import DecayPlan as DecayPlan
from anybatch.conversion.weight_decay import DecayRow as DecayRow
from anybatch.conversion.weight_decay import decay_plan as decay_plan
from anybatch.conversion.weight_decay import param_groups as param_groups
from anybatch.core.notices import NoEffectWarning as NoEffectWarning
