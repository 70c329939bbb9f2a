"""The fuzzers by name: whole ones, and with how many cases a few seconds of each."""

from tests.fuzz.adapters import Adapters
from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.doctors import Doctors
from tests.fuzz.essa_checkpoints import EssaCheckpoints
from tests.fuzz.kills import Kills
from tests.fuzz.packed import PackedCheckpoints
from tests.fuzz.soak import Soak
from tests.fuzz.stores import Stores
from tests.fuzz.trainer_checkpoints import TrainerCheckpoints
from tests.fuzz.workers import Target

TARGETS: dict[str, Target] = {
    "checkpoints": Checkpoints(),
    "packed-checkpoints": PackedCheckpoints(),
    "adapters": Adapters(),
    "stores": Stores(),
    "trainer-checkpoints": TrainerCheckpoints(),
    "essa-checkpoints": EssaCheckpoints(),
    "doctors": Doctors(),
    "kills": Kills(),
    "soak": Soak(),
}
# Most of the time of the last two would go into the undisturbed runs of every kind.
QUICK: dict[str, tuple[Target, int]] = {
    "checkpoints": (Checkpoints(), 60),
    "packed-checkpoints": (PackedCheckpoints(), 30),
    "adapters": (Adapters(), 40),
    "stores": (Stores(), 100),
    "trainer-checkpoints": (TrainerCheckpoints(("sft", "full disk")), 10),
    "essa-checkpoints": (EssaCheckpoints(), 25),
    "doctors": (Doctors(), 40),
    "kills": (Kills(("sft", "full disk", "save full disk", "save adapter", "merge")), 5),
    "soak": (Soak(num_steps=300), 1),
}

__all__ = ["QUICK", "TARGETS"]
