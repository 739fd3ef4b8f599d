"""Floor 2: HTTP. An API that clients of OpenAI's speak, a chat page, the status page, and /metrics.

What answers and what is shown come in through the protocols of `ports`; nothing here knows the swarm or a tensor.
"""
