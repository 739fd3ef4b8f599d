"""Floor 2: hivemind. Leases and presences in the DHT, blobs, anti-entropy and activations over p2pd's streams."""

import logging

_level = logging.getLogger("hivemind").level

from hivemind.utils.logging import use_hivemind_log_handler  # noqa: E402

# To import hivemind sets its level, renames another one, and gives it a handler: the program's own logging decides.
use_hivemind_log_handler("nowhere")
logging.addLevelName(logging.WARNING, "WARNING")
logging.getLogger("hivemind").setLevel(_level)
