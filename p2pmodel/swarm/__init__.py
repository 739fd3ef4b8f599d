"""Floor 2: hivemind. Leases and presences in the DHT, blobs, anti-entropy and activations over p2pd's streams."""

import logging

from hivemind.utils.logging import use_hivemind_log_handler

# hivemind logs through a handler of its own and renames a level; the program's own logging decides instead.
use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")
logging.getLogger("hivemind").setLevel(logging.WARNING)
