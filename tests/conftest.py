"""No test asks a network: what is not on this machine is missing at once."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
