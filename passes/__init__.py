"""Which rewrites does rgc bring, in which order are they tried, and which of them need a fixed input size?"""

from rgc.passes.absorb_residual import absorb_residual
from rgc.passes.box_mean import box_mean
from rgc.passes.collapse import collapse
from rgc.passes.distribute_over_branches import distribute_over_branches
from rgc.passes.distribute_scale import distribute_scale
from rgc.passes.drop_dead_channels import drop_dead_channels
from rgc.passes.drop_identity import drop_identity
from rgc.passes.exchange_max_pool import exchange_max_pool
from rgc.passes.exchange_pixel_shuffle import exchange_pixel_shuffle
from rgc.passes.exchange_resampling import exchange_resampling
from rgc.passes.fold_batchnorm import fold_batchnorm
from rgc.passes.fold_border import fold_border
from rgc.passes.fold_scale import fold_scale
from rgc.passes.hygiene import hygiene
from rgc.passes.merge_branches import merge_branches
from rgc.passes.merge_pointwise import merge_pointwise
from rgc.passes.merge_rearrangement import merge_rearrangement
from rgc.passes.merge_stage import merge_stage
from rgc.passes.move_views import move_views
from rgc.passes.remove_linear_activation import remove_linear_activation
from rgc.passes.single_path import single_path

#: Every built-in pass, in the order in which they are tried at a value.
ALL = (
    hygiene,
    drop_dead_channels,
    distribute_scale,
    remove_linear_activation,
    drop_identity,
    fold_batchnorm,
    fold_scale,
    fold_border,
    exchange_max_pool,
    exchange_resampling,  # before what would join a 1x1 and a pooling: the 1x1 is cheaper behind it
    merge_pointwise,
    merge_rearrangement,
    exchange_pixel_shuffle,
    merge_stage,
    absorb_residual,
    distribute_over_branches,
    merge_branches,
    move_views,
    box_mean,  # before what would take the whole map: of what it leaves, that takes the rest if it pays
    collapse,
)

#: Exact, but they change the structure at a price: made only if asked for by name.
OPT_IN = (single_path,)

#: Exact for any input size: all but what can only be said at a fixed one.
DEFAULT = tuple(each for each in ALL if each not in (box_mean, collapse))

__all__ = ["ALL", "DEFAULT", "OPT_IN"]
