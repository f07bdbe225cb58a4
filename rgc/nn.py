"""What does rgc give to training code? Layers whose activations decay, schedules for them, and losses.

The names that a training script takes from here; each lives in the file that answers its question.
"""

from rgc.decay import DecayedActivation, DecayedLeakyReLU, SeriesActivation, set_decay
from rgc.decay_schedule import DecayGroup, DecaySchedule
from rgc.knowledge_distillation import distillation_loss
from rgc.linearization import linearize

__all__ = [
    "DecayGroup",
    "DecaySchedule",
    "DecayedActivation",
    "DecayedLeakyReLU",
    "SeriesActivation",
    "distillation_loss",
    "linearize",
    "set_decay",
]
