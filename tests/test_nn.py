"""Does rgc.nn hold what training code takes from it, under the names that were promised?"""

from __future__ import annotations

import pickle

import rgc
from rgc.nn import DecayedActivation


def test_every_name_is_there_and_documented() -> None:
    for name in rgc.nn.__all__:
        assert (getattr(rgc.nn, name).__doc__ or "").strip(), name


def test_what_was_pickled_under_the_name_of_rgc_nn_still_loads() -> None:
    assert pickle.loads(b"crgc.nn\nDecayedActivation\n.") is DecayedActivation
