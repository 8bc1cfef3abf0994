"""Training helpers: learned clipping, schedules of what is frozen and switched, parameters grouped for the optimizer.

In: what `prepare_qat_pt2e` returned, and the user's own loop. Out: the same, switched at the steps that were asked for.
"""

from quant2e.observers.learned_fake_quant import LearnedFakeQuantizeBase, PACTFakeQuantize, clipping_penalty
from quant2e.observers.placeholder import FixedAmaxObserver
from quant2e.training.names import select_names
from quant2e.training.parameter_groups import parameter_groups
from quant2e.training.schedule import Schedule, ScheduledAction

__all__ = [
    "FixedAmaxObserver",
    "LearnedFakeQuantizeBase",
    "PACTFakeQuantize",
    "Schedule",
    "ScheduledAction",
    "clipping_penalty",
    "parameter_groups",
    "select_names",
]
