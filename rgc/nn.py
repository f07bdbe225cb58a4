"""What does rgc give to training code? Layers that decay or can be specialised, schedules for them, and losses.

The names that a training script takes from here; each lives in the file that answers its question.
"""

from rgc.choices import Between, Choice, OneOf, Vector
from rgc.conditional import CondConv2d
from rgc.decay import DecayedActivation, DecayedLeakyReLU, SeriesActivation, set_decay
from rgc.decay_schedule import DecayGroup, DecaySchedule
from rgc.dynamic import Dynamic, choose
from rgc.early_exit import EarlyExit, joint_exit_loss
from rgc.knowledge_distillation import distillation_loss
from rgc.linearization import linearize
from rgc.skipping import SkipGate, Skippable
from rgc.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    channels_at,
)
from rgc.slimming_gate import ChannelAttention, GatedWidth, SlimmingGate, gate_targets
from rgc.width_training import EnsembleBootstrap, sandwich, sandwich_step

__all__ = [
    "Between",
    "ChannelAttention",
    "Choice",
    "CondConv2d",
    "DecayGroup",
    "DecaySchedule",
    "DecayedActivation",
    "DecayedLeakyReLU",
    "Dynamic",
    "EarlyExit",
    "EnsembleBootstrap",
    "GatedWidth",
    "OneOf",
    "SeriesActivation",
    "SkipGate",
    "Skippable",
    "SlimmableBatchNorm2d",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SlimmingGate",
    "SwitchableBatchNorm2d",
    "Vector",
    "channels_at",
    "choose",
    "distillation_loss",
    "gate_targets",
    "joint_exit_loss",
    "linearize",
    "sandwich",
    "sandwich_step",
    "set_decay",
]
