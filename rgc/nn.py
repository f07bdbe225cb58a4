"""What does rgc give to training code? Layers that decay or can be specialised, schedules for them, and losses.

The names that a training script takes from here; each lives in the file that answers its question.
"""

from rgc.choices import Between, Choice, OneOf, Vector
from rgc.decay import DecayedActivation, DecayedLeakyReLU, SeriesActivation, set_decay
from rgc.decay_schedule import DecayGroup, DecaySchedule
from rgc.dynamic import Dynamic, choose
from rgc.knowledge_distillation import distillation_loss
from rgc.linearization import linearize
from rgc.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    channels_at,
)

__all__ = [
    "Between",
    "Choice",
    "DecayGroup",
    "DecaySchedule",
    "DecayedActivation",
    "DecayedLeakyReLU",
    "Dynamic",
    "OneOf",
    "SeriesActivation",
    "SlimmableBatchNorm2d",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SwitchableBatchNorm2d",
    "Vector",
    "channels_at",
    "choose",
    "distillation_loss",
    "linearize",
    "set_decay",
]
