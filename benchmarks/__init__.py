"""Commands that measure; each prints one JSON line per result."""

import logging

# As `lowmem/__init__.py` does, for commands that import PEFT first: it imports bitsandbytes, which asks for kernels
# that nothing here runs, and the message reads like the cause of what fails later.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in record.getMessage()
)
